# make tune    install what is needed and run the tuning job
# make test    install and run all tests
# make proofs  the long forms of some tests
# make quick   the tests that are not slow: a minute or two
# make check   install and run linter and type checker
# make audit   known vulnerabilities of the pinned packages, asked of pypi.org by pip-audit: needs a network
# make zoo     install timm, torchvision, transformers and take all real models through qflow: minutes
# make gpu     calibration, sensitivity, a study and QAT on a GPU against the CPU: minutes
# make torch-matrix  the fast tests of the engine under each torch of TORCHES, in fresh environments
# make picture draw docs/architecture.svg from the imports
# make docs   the documentation as a site in build/site; a warning or a link that leads nowhere fails
# make screenshots  the pictures of the pages in docs/, of a fresh study: minutes, needs chromium and chromedriver
# make ui      show the runs in the browser
# make dashboard  show the search in optuna-dashboard
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A file is one process's, in the order of tests/conftest.py.
TESTS = $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: tune test proofs quick check audit zoo gpu torch-matrix picture docs screenshots ui dashboard clean

tune: $(VENV)/.base
	$(BIN)/python -m qflow.tune +experiment=int8_int16

test: $(VENV)/.dev
	$(TESTS)

proofs: $(VENV)/.dev
	$(TESTS) -m proof

quick: $(VENV)/.dev
	$(TESTS) -m 'not slow and not proof'

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

AUDIT_FAILED := audit: not passed. Either a package above has a known vulnerability, or one could not be looked up at
AUDIT_FAILED += pypi.org, and then nothing is known of those that follow it.
audit: $(VENV)/.audit
	$(BIN)/python -m pip_audit --strict --requirement constraints.txt --no-deps --disable-pip --progress-spinner off \
	    || { echo '$(AUDIT_FAILED)'; exit 1; }

zoo: $(VENV)/.zoo
	$(BIN)/python -m benchmarks.zoo

gpu: $(VENV)/.zoo
	$(BIN)/python -m benchmarks.gpu

# TORCHES="2.6.0 2.8.0" PYTHONS="python3.10 python3.11" FOLDER=/tmp/torches INDEX=<url> choose what and where.
TORCHES ?= 2.6.0 2.8.0 2.10.0 newest
PYTHONS ?= python3.10 python3.11
FOLDER ?= build/torch-matrix
torch-matrix: $(VENV)/.dev
	$(BIN)/python -m benchmarks.torch_matrix --torches $(TORCHES) --pythons $(PYTHONS) \
	    --folder $(FOLDER) $(if $(INDEX),--index $(INDEX))

picture: $(VENV)/.dev
	$(BIN)/python tests/support/architecture.py

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build # with --quiet it would not fail

screenshots: $(VENV)/.dev
	$(BIN)/python tests/support/screenshots.py

ui: $(VENV)/.base
	$(BIN)/mlflow ui --workers 1 --backend-store-uri sqlite:///$(CURDIR)/qflow_out/mlflow.db

dashboard: $(VENV)/.dashboard
	$(BIN)/optuna-dashboard sqlite:///$(CURDIR)/qflow_out/optuna.db

clean:
	rm -rf $(VENV) build *.egg-info

# A torch that Python already has is used as it is, whatever its version; otherwise the tested one is installed.
$(VENV)/constraints.txt: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	    $$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages)
	if $(BIN)/python -c 'import torch' 2>/dev/null; \
	    then grep -Ev '^torch(vision)?==' constraints.txt > $@; \
	    $(BIN)/python -c 'import torch; print("torch==" + torch.__version__.partition("+")[0])' >> $@; \
	    else cp constraints.txt $@; fi

INSTALL_OPTIONS ?=
INSTALL := $(BIN)/python -m pip install --quiet $(INSTALL_OPTIONS) --constraint $(VENV)/constraints.txt --editable

$(VENV)/.base: $(VENV)/constraints.txt pyproject.toml
	$(INSTALL) .
	touch $@

$(VENV)/.dev: $(VENV)/constraints.txt pyproject.toml
	$(INSTALL) '.[dev]'
	touch $@ $(VENV)/.base

$(VENV)/.audit: $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet $(INSTALL_OPTIONS) --constraint $(VENV)/constraints.txt pip-audit \
	    || { echo 'audit: pip-audit could not be installed, so nothing was audited.'; exit 1; }
	touch $@

$(VENV)/.dashboard: $(VENV)/.base
	$(INSTALL) '.[dashboard]'
	touch $@

$(VENV)/.zoo: $(VENV)/.dev
	$(INSTALL) '.[zoo]'
	touch $@
