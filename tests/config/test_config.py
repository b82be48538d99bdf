"""A configuration that cannot work is refused before any work, in one line that names what exists."""

import os
import signal
import subprocess
import sys
from itertools import zip_longest

import pytest
from support.compose import BASE, compose, run

from qflow.config.command import run_command
from qflow.config.explain import experiments
from qflow.config.keys import conf_dir
from qflow.config.settings import load_resolved, plain, resolved_yaml, trial_settings
from qflow.config.space import parse_domain, search_space
from qflow.core.errors import ConfigError
from qflow.search.domain import Choice, Interval, Range

REFUSED = {
    "strategy": ([BASE, "search.strategy=magic"], "search.strategy is one of optuna, ratio, assign"),
    "evaluations": (
        ["+experiment=int8_int16", "search.max_evaluations=0"],
        "search.max_evaluations lies between 1 and",
    ),
    "rates": (["+experiment=int8_int16", "search.rates=[0.0]"], "search.rates is a number above 0"),
    "apply": (["+experiment=int8_int16", "qat.apply=never"], "qat.apply is one of every_trial, after_search"),
    "unknown experiment": (["+experiment=nope"], "got experiment/nope. Options: full, int16"),
    "misspelt experiment": (["+experiment=int8_int61"], "Did you mean int8_int16? Options: full, int16"),
    "an experiment alone": (["int8-int16"], "without =. Did you mean +experiment=int8_int16?"),
    "misspelt value": ([BASE, "calibration.method=mze"], "clip_std, but got 'mze'. Did you mean mse?"),
    "misspelt strategy": ([BASE, "search.strategy=optima"], "but got 'optima'. Did you mean optuna?"),
    "misspelt workflow": ([BASE, "workflow=fulll"], "but got 'fulll'. Did you mean full?"),
    "no experiment": ([], "Add +experiment=<name>: full, int16, int16_fp16, int8, int8_int16"),
    "misspelt key": (
        [BASE, "calibration.batchsize=3"],
        "got calibration.batchsize. Did you mean calibration.batch_size? Keys of calibration: method, batch_size",
    ),
    "a key without its group": ([BASE, "n_trials=9"], "got n_trials. Did you mean search.n_trials? Keys of tune"),
    "a misspelt key without its group": ([BASE, "max_dorp=9"], "got max_dorp. Did you mean objective.max_drop?"),
    "added key": ([BASE, "+calibration.foo=3"], "got calibration.foo. Keys of calibration: method, batch_size"),
    "misspelt group": (
        [BASE, "calibation=kl"],
        "got calibation. Did you mean calibration? Keys of tune",
    ),
    "unknown option": ([BASE, "calibration=klx"], "got calibration/klx. Options: default, minmax, percentile"),
    "wrong type": (
        [BASE, "calibration.steps=abc"],
        "calibration.steps is a whole number, but got 'abc'. Leave it out, or see calibration in --help.",
    ),
    "illegal value": (
        [BASE, "calibration.method=foo"],
        "calibration.method is one of minmax, percentile, mse, kl, mix",
    ),
    "ratio outside 0..1": ([BASE, "qconfig.int16_ratio=1.5"], "qconfig.int16_ratio lies between 0 and 1, but got 1.5"),
    "illegal dtype": ([BASE, "+qconfig.modules.conv=int16"], "qconfig.modules.conv is one of qint8, qint16"),
    "search outside the range": ([BASE, "qconfig.int16_ratio=interval(0,2)"], "lies between 0 and 1, but got 2"),
    "search of an unknown key": ([BASE, "calibration.methd=choice(a,b)"], "got calibration.methd"),
    "search of what is not a trial's": (
        [BASE, "seed=choice(1,2)"],
        "varies keys of calibration, qconfig, qat or repair, but got seed",
    ),
    "a range in braces without quotes": (
        [BASE, "search.space={qconfig.int16_ratio: choice(0.1,0.3)}"],
        "A range inside braces is text, but got one without quotes. Write key=",
    ),
    "no search value": ([BASE, "search.space.calibration.steps=7"], "choice(...), interval(...), range(...)"),
    "negative goal": ([BASE, "objective.max_drop=-1"], "objective.max_drop is a number of at least 0, but got -1"),
    "sampler": ([BASE, "search.sampler=grid"], "search.sampler is one of tpe, gp, nsga2, random, but got 'grid'"),
    "trials": ([BASE, "search.n_trials=1"], "search.n_trials lies between 2 and 1000000"),
    "batch of none": ([BASE, "task.batch_size=0"], "task.batch_size lies between 1 and 1000000, but got 0"),
    "a march without its rules": ([BASE, "device.march=nash-x"], "but got device.march=nash-x. Choose a device file"),
    "no device file": ([BASE, "device=nowhere.yaml"], "but got nowhere.yaml: No such file"),
    "no option": (
        [BASE, "calibration=3"],
        "names an option of a group, but got Config group override must be a string",
    ),
    "a blank that split a value": ([BASE, "file"], "is key=value, but got 'file' without =. Quote a value with blanks"),
    "a module's own signs": (
        [BASE, "qconfig.modules.[add](1)=qint16"],
        "Paste: 'qconfig.modules={\\[add\\]\\(1\\): qint16}'",
    ),
    "loss that does not import": (
        [BASE, "qat=default", "qat.optimizer._targt_=x"],
        "got qat.optimizer._targt_. Did you mean qat.optimizer._target_? Keys of qat.optimizer: _target_",
    ),
}


FILES = {
    "task/broken.yaml: name: x\nmodel: {_target_: y\n  data: [": "A configuration file is YAML, but got while parsing",
    "task/broken.yaml: defaults: [custmo]\nname: x": "but got task/custmo in task/broken. Shipped are: custom",
}


@pytest.mark.parametrize("text", FILES)
def test_a_file_that_cannot_be_read_gets_one_line(text, capsys, tmp_path):
    name, _, content = text.partition(": ")
    (tmp_path / "task").mkdir()
    (tmp_path / name).write_text(content)
    code, error = run(capsys, BASE, "task=broken", "--config-dir", str(tmp_path))
    assert (code, error.count("\n")) == (2, 1)
    assert FILES[text] in error


def test_a_device_is_also_a_path(tmp_path, capsys):
    (tmp_path / "basis.yaml").write_text("defaults: [nash-e, _self_]\nmarch: basis\n")
    (tmp_path / "nash-m.yaml").write_text("defaults: [basis, _self_]\ncost: {host_ms: 9.0}\n")
    seen = []
    argv = sys.argv
    try:
        with pytest.raises(SystemExit) as stop:
            run_command("tune", lambda c: seen.append(c.device) or 0, [BASE, f"device={tmp_path}/nash-m.yaml"])
    finally:
        sys.argv = argv
    assert stop.value.code == 0, capsys.readouterr().err
    assert (seen[0].march, seen[0].cost.host_ms, seen[0].cost.clock_ghz) == ("basis", 9.0, 1.0)


def test_module_names_need_no_plus():
    config = compose(BASE, "qconfig.modules={neck.fuse: qint16}", "qat.rates.backbone=0.1")
    assert plain(config.qconfig.modules) == {"neck.fuse": "qint16"}
    assert plain(config.qat.rates) == {"backbone": 0.1}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_gets_one_line_and_code_2(case, capsys):
    arguments, message = REFUSED[case]
    code, error = run(capsys, *arguments)
    assert code == 2
    assert error.startswith("qflow: ")
    assert error.count("\n") == 1
    assert message in error, error


def test_the_search_grammar_is_hydras():
    parse = parse_domain
    assert parse("k", "choice(mse, kl)") == Choice(("mse", "kl"))
    assert parse("k", "choice(8,16)") == Choice((8, 16))
    assert parse("k", "interval(0, 1)") == Interval(0.0, 1.0)
    assert parse("k", "tag(log, interval(1e-6, 1e-2))") == Interval(1e-6, 1e-2, log=True)
    assert parse("k", "range(4, 20, 4)") == Range(4, 20, 4)
    with pytest.raises(ConfigError, match="Correct the brackets"):
        parse("k", "choice(1,")


def test_a_sweep_on_the_command_line_becomes_a_search():
    config = compose("experiment=int8_int16", "calibration.batch_size=choice(4,8)", "qconfig.int16_ratio=0.5,0.25")
    space = search_space(config)
    assert space["calibration.batch_size"] == Choice((4, 8))
    assert space["qconfig.int16_ratio"] == Choice((0.5, 0.25))
    assert config.calibration.batch_size == 16


def test_one_value_on_the_command_line_fixes_a_key():
    space = search_space(compose(BASE, "calibration.method=kl", "qconfig.int16_ratio=0.3"))
    assert set(space) == {"calibration.batch_size", "calibration.steps"}
    assert "calibration.method" in search_space(compose(BASE, "calibration=minmax"))
    both = compose(BASE, "calibration.method=kl", "~search.space.calibration.method")
    assert "calibration.method" not in search_space(both)


def test_a_trial_is_the_configuration_with_its_parameters_in_place():
    config = compose(BASE)
    settings = trial_settings(config, {"calibration.method": "kl", "qconfig.int16_ratio": 0.25})
    assert (settings.calibration.method, settings.qconfig.int16_ratio) == ("kl", 0.25)
    assert config.calibration.method != "kl"


def test_rates_of_modules_keep_their_ratio_to_a_rate_that_a_trial_tries():
    config = compose(BASE, "qat.learning_rate=1e-3", "qat.rates={backbone: 1e-4, head.cls: 2e-3}")
    assert trial_settings(config).qat.rates == {"backbone": 1e-4, "head.cls": 2e-3}
    tried = trial_settings(config, {"qat.learning_rate": 1e-5}).qat
    assert (tried.learning_rate, tried.rates) == (1e-5, {"backbone": 1e-6, "head.cls": 2e-5})
    stated = trial_settings(config, {"qat.learning_rate": 1e-5, "qat.rates.backbone": 0.5}).qat
    assert stated.rates == {"backbone": 0.5, "head.cls": 2e-5}
    assert trial_settings(config, {"qat.learning_rate": 1e-3}).qat.rates == {"backbone": 1e-4, "head.cls": 2e-3}


def test_a_resolved_configuration_comes_back():
    config = compose(BASE, "calibration.steps=7", "root=/nowhere")
    back = load_resolved(resolved_yaml(config))
    assert plain(back)["calibration"] == plain(config)["calibration"]
    assert back.calibration.steps == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_time_is_an_interrupt_with_a_line(number, capsys):
    def act(_config):
        signal.raise_signal(number)

    with pytest.raises(SystemExit) as ended:
        run_command("tune", act, [BASE])
    assert ended.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("qflow: Interrupted.")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_stored_configuration_holds_no_password():
    config = compose(BASE, "tracking.uri='postgresql://bob:s3cret@host/mlflow'", "root=/nowhere")
    assert "uri: postgresql://bob:***@host/mlflow" in resolved_yaml(config)
    assert config.tracking.uri == "postgresql://bob:s3cret@host/mlflow"


@pytest.mark.parametrize("march", ["nash-m", "nash-e"])
def test_device_files_fit_their_records(march):
    from qflow.core.device_rules import DeviceRules
    from qflow.core.graph import OpKind
    from qflow.cost_model.model import CostModel

    config = compose(BASE, f"device={march}")
    rules = DeviceRules(march=march, oe_version="3.0.17", **plain(config.device.rules))
    kinds = {k.value for k in OpKind}
    assert {*rules.int8_inputs, *rules.int8_outputs, *rules.float16_kinds} <= kinds
    assert list(rules.inner_int16) == ["layer_norm", "softmax"]
    exact = compose(BASE, f"device={march}", "device.rules.inner_int16=[]")
    assert DeviceRules(march=march, oe_version="3.0.17", **plain(exact.device.rules)).inner_int16 == []
    assert CostModel(march=march, **plain(config.device.cost)).clock_ghz == {"nash-m": 1.5, "nash-e": 1.0}[march]


@pytest.mark.slow
def test_every_option_composes():
    for path in (conf_dir() / "experiment").glob("*.yaml"):
        assert f"+experiment={path.stem}" in path.read_text()  # opens with the command that runs it
        compose(f"+experiment={path.stem}", name="tune" if path.stem in experiments() else "train_float")
    groups = [path.name for path in conf_dir().iterdir() if path.is_dir() and path.name != "experiment"]
    files = [sorted((conf_dir() / group).glob("*.yaml")) for group in groups]
    for chosen in zip_longest(*files):  # an option of each group at a time
        compose(BASE, *(f"{'+' * (p.parent.name == 'debug')}{p.parent.name}={p.stem}" for p in chosen if p))


def python(*arguments, cwd, **env):
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_help_config_and_completion_work_from_any_folder_without_torch(tmp_path):
    shown = python("-X", "importtime", "-m", "qflow.tune", "--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert shown.stdout.startswith("python -m qflow.tune +experiment=<name>")
    assert "task: custom, detection, digits, dual, exposure, huggingface, onnx," in shown.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in shown.stderr.splitlines() if "|" in line}
    assert not imported & {"torch", "mlflow", "optuna", "pandas", "sklearn", "hydra", "omegaconf", "numpy"}
    job = python("-m", "qflow.tune", "--cfg", "job", BASE, cwd=tmp_path)
    assert "workflow: int8_int16" in job.stdout
    completion = python("-m", "qflow.tune", "-sc", "install=bash", cwd=tmp_path)
    assert "hydra_bash_completion" in completion.stdout


def test_paths_resolve_against_the_users_folder(tmp_path):
    job = python("-m", "qflow.tune", "--cfg", "job", "--resolve", BASE, cwd=tmp_path, QFLOW_HOME="")
    assert f"root: {tmp_path}/qflow_out" in job.stdout or "root: ''" in job.stdout


def test_schemas_mirror_the_records_they_are_checked_into():
    """Hydra needs mutable schemas and records are frozen: two classes, one set of fields and defaults."""
    from dataclasses import MISSING, fields

    from qflow.config import schema
    from qflow.core import settings
    from qflow.core.device_rules import DeviceRules
    from qflow.cost_model.model import CostModel

    def defaults(cls, skip=()):
        return {
            f.name: f.default_factory() if f.default_factory is not MISSING else f.default
            for f in fields(cls)
            if f.name not in skip
        }

    for name in ("Calibration", "QConfig", "Sensitivity"):
        assert defaults(getattr(schema, f"{name}Schema")) == defaults(getattr(settings, f"{name}Settings")), name
    named = ("march", "oe_version")
    assert set(defaults(schema.RulesSchema)) == set(defaults(DeviceRules, named))
    assert set(defaults(schema.CostSchema)) == set(defaults(CostModel, named))


@pytest.mark.slow
def test_a_reader_that_closes_the_pipe_ends_a_command_in_silence(tmp_path):
    """`--help | head -1`: no traceback, and not the code of a missed goal."""
    import os
    import subprocess
    import sys

    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "qflow.check", "--help"], cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
