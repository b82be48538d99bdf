# make tune    install what is needed and run the tuning job
# make test    install and run all tests
# make quick   the tests that are not slow: a minute or two
# make check   install and run linter and type checker
# make picture draw docs/architecture.svg from the imports
# make ui      show the runs in the browser
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: tune test quick check picture ui clean

tune: $(VENV)/.base
	$(BIN)/python -m qflow.tune +experiment=int8_int16

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

quick: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile -m 'not slow'

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

picture: $(VENV)/.dev
	$(BIN)/python tests/support/architecture.py

ui: $(VENV)/.base
	$(BIN)/mlflow ui --workers 1 --backend-store-uri sqlite:///$(CURDIR)/qflow_out/mlflow.db

clean:
	rm -rf $(VENV) build *.egg-info

# A torch that Python already has is used as it is, whatever its version; otherwise the tested one is installed.
$(VENV)/constraints.txt: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	    $$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages)
	if $(BIN)/python -c 'import torch' 2>/dev/null; \
	    then grep -v '^torch==' constraints.txt > $@; else cp constraints.txt $@; fi

$(VENV)/.base: $(VENV)/constraints.txt pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint $< --editable .
	touch $@

$(VENV)/.dev: $(VENV)/constraints.txt pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint $< --editable '.[dev]'
	touch $@ $(VENV)/.base
