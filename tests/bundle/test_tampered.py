"""Runs that were changed after they were written: nothing of theirs is executed or registered, each gets one line.

In the first table somebody changed files and could not change the tag with their digest; in the second they own the
whole run, digest and tags included, and try to have code of their choice run, or wrong numbers registered.
"""

import json
import math
import os
import shutil

import pytest
from support.compose import compose
from support.stored import store_trial, uri_of

from qflow.bundle.files import DIGEST, digests, files_digest
from qflow.core.errors import BundleError, QflowError
from qflow.tracking.artifacts import Store

pytestmark = pytest.mark.slow  # works with a store


class Stored:
    """A trial in a store, whose files and tags can be changed and put back."""

    def __init__(self, folder):
        self.root = folder
        self.run, _ = store_trial(folder, "task=digits", "qat=dual", "qat.steps=2", point={"qconfig.int16_ratio": 0.0})
        self.store = Store.open(uri_of(folder), folder)
        self.tags, _, address = self.store.run(self.run)
        self.files = folder.__class__(address.removeprefix("file://"))
        self.copy = folder / "copy"
        shutil.copytree(self.files, self.copy)

    def put_back(self):
        shutil.rmtree(self.files)
        shutil.copytree(self.copy, self.files)
        for key in (DIGEST, "qflow.scales", "qflow.result", "qflow.study"):
            self.store.client.set_tag(self.run, key, self.tags[key])

    def forge(self):
        self.store.client.set_tag(self.run, DIGEST, files_digest(digests(self.files)))

    def edit(self, name, before, after):
        text = (self.files / name).read_text()
        assert before in text
        (self.files / name).write_text(text.replace(before, after))

    def promote(self, *overrides):
        from qflow.commands.promote import promote

        return promote(compose(f"run={self.run}", f"root={self.root}", *overrides, name="promote"))[0]

    def registered(self):
        return list(self.store.client.search_model_versions(""))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return Stored(tmp_path_factory.mktemp("store"))


@pytest.fixture(autouse=True)
def restored(stored):
    yield
    stored.put_back()


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


CHANGED = {
    "an extra file": lambda s: (s.files / "more.json").write_text("{}"),
    "an extra file in a folder": lambda s: (s.files / "qconfig" / "model.pkl").write_bytes(b"cos\nsystem\n."),
    "a missing file": lambda s: (s.files / "cost.json").unlink(),
    "a flipped byte in the weights": lambda s: flip(s.files / "qconfig" / "weights.safetensors"),
    "a flipped byte in a table": lambda s: flip(s.files / "qconfig.txt"),
    "other scales": lambda s: shutil.copy(s.files / "cost.json", s.files / "qconfig" / "scales.json"),
    "a link": lambda s: [(s.files / "cost.json").unlink(), (s.files / "cost.json").symlink_to("/etc/passwd")],
    "a linked folder": lambda s: [shutil.rmtree(s.files / "qconfig"), (s.files / "qconfig").symlink_to(s.copy)],
    "a pipe": lambda s: [(s.files / "cost.json").unlink(), os.mkfifo(s.files / "cost.json")],
    "another target": lambda s: s.edit("config.yaml", "qflow.tasks.digits.build_model", "os.getcwd"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_changed_files_are_refused_before_anything_is_built(case, stored, capsys):
    CHANGED[case](stored)
    refused(stored, capsys)


def refused(stored, capsys, *overrides):
    """Refused in one line before anything is rebuilt."""
    with pytest.raises(QflowError) as error:
        stored.promote(*overrides)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert "rebuilt" not in capsys.readouterr().out
    assert stored.registered() == []
    return str(error.value)


MODEL = "_target_: qflow.tasks.digits.build_model"
DEEP = "[" * 100_000 + "]" * 100_000
BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
TOUCH = "{{_target_: pathlib.Path.touch, _args_: [{{_target_: pathlib.Path, _args_: [{canary}]}}]}}"
TWICE = f'"\\\\\\x24{{{{oc.create:{TOUCH}}}}}"'  # after the first reading of it an interpolation is left


def target(name, /, **arguments):
    return f"_target_: {name}" + "".join(f"\n    {key}: {value}" for key, value in arguments.items())


OWNED = {
    "torch's own shell": ("config.yaml", MODEL, target("torch.utils.collect_env.run", command="touch {canary}")),
    "a builtin": ("config.yaml", MODEL, target("builtins.eval", _args_="[\"open('{canary}', 'w')\"]")),
    "os.system": ("config.yaml", MODEL, target("os.system", command="touch {canary}")),
    "a name below a built-in task": ("config.yaml", MODEL, target("qflow.tasks.digits.torch.load", f="{canary}")),
    "hydra itself": ("config.yaml", MODEL, target("hydra.utils.instantiate", config="{{}}")),
    "a metric": ("config.yaml", "qflow.tasks.digits.Accuracy", "subprocess.getoutput"),
    "a loss": ("config.yaml", "qflow.tasks.digits.loss", "os.system"),
    "an optimizer": ("config.yaml", "torch.optim.AdamW", "torch.hub.load"),
    "an optimizer's base": ("config.yaml", "torch.optim.AdamW", "torch.optim.Optimizer.__init__"),
    "a nested target": (
        "config.yaml",
        "calibration_size: 512",
        "calibration_size:\n      _target_: os.system\n      command: touch {canary}",
    ),
    "an own metric": ("config.yaml", "own_metric:\n    _target_: ''", "own_metric:\n    _target_: os.system"),
    "an interpolation": ("config.yaml", "registered_model: digits", "registered_model: ${{oc.env:HOME}}"),
    "an escaped interpolation": ("config.yaml", "registered_model: digits", 'registered_model: "\\x24{{oc.env:HOME}}"'),
    "an interpolation that is escaped twice": ("config.yaml", MODEL, f"{MODEL}\n    epochs: {TWICE}"),
    "an interpolation as a key": ("config.yaml", MODEL, f'{MODEL}\n    "\\x24{{{{oc.env:HOME}}}}": 1'),
    "a YAML tag": ("config.yaml", "registered_model: digits", "registered_model: !!python/name:os.system ''"),
    "a YAML alias bomb": ("config.yaml", "workflow: int8_int16", BOMB + "workflow: int8_int16"),
    "deep YAML": ("config.yaml", "enqueue:", f"space2: {DEEP[:2000]}\n  enqueue:"),
    "another schema": ("config.yaml", "method: mse", "method: {{a: 1}}"),
    "deep JSON": ("manifest.json", "{{", '{{"deep": ' + DEEP + ","),
    "no JSON": ("qconfig/qconfig.json", "{{", "{{{{"),
    "NaN in JSON": ("qconfig/qconfig.json", '"march": "nash-m"', '"march": NaN'),
    "other keys": ("qconfig/requested.json", '"march":', '"march2":'),
    "a list for a mapping": ("qconfig/quantizers.json", "", "[]"),
    "scales of another number": ("qconfig/scales.json", "", '{{"conv1": 1.0}}'),
    "more threads than a system starts": ("config.yaml", "threads: 0", "threads: 100000000"),
    "a search that cannot work": ("config.yaml", "n_trials:", "n_trials: -1 #"),
    "a device file for a network": ("config.yaml", MODEL, target("qflow.tasks.onnx_model.load", path="/dev/zero")),
    "a parent's weights": (
        "config.yaml",
        MODEL,
        target("qflow.tasks.perception.model.build_model", weights="../../x.safetensors"),
    ),
    "a path without its name": (
        "config.yaml",
        MODEL,
        target("qflow.tasks.onnx_model.load", _args_="['\\\\host\\share\\x.onnx']"),
    ),
    "a folder by timm's prefix": (
        "config.yaml",
        MODEL,
        target("qflow.tasks.images.timm_models.build_model", name="Local-Dir:evil"),
    ),
    "a registered model of its choice": ("config.yaml", "registered_model: digits", "registered_model: production"),
    "an alias of its choice": ("config.yaml", "alias: champion", "alias: production"),
    "a name that turns a terminal red": ("config.yaml", "registered_model: digits", 'registered_model: "a\\e[31m"'),
    "a text with NUL": ("manifest.json", "{{", '{{"a\\u0000": 1,'),
    "one key twice": ("config.yaml", "registered_model: digits", "registered_model: a\n  registered_model: digits"),
    "two documents": ("config.yaml", "", "study: a\n---\nstudy: b\n"),
    "a list": ("config.yaml", "", "- 1\n"),
    "a number of 5000 digits": ("config.yaml", "", f"seed: {'9' * 5000}\n"),
    "threads without end": ("manifest.json", '"threads": 1', '"threads": 100000000000'),
}


@pytest.mark.parametrize("case", OWNED)
def test_an_owned_run_decides_nothing_about_code(case, stored, capsys, tmp_path):
    name, before, after = OWNED[case]
    canary = tmp_path / "canary"
    before, after = (text.format(canary=canary) for text in (before, after))
    if before:
        stored.edit(name, before, after)
    else:
        (stored.files / name).write_text(after)
    stored.forge()
    refused(stored, capsys)
    assert not canary.exists()


def test_a_study_has_a_name(stored, capsys):
    stored.store.client.set_tag(stored.run, "qflow.study", "x\x1b[31m\nverdict     ACCEPT")
    assert "A study name is words" in refused(stored, capsys)
    assert "\x1b" not in capsys.readouterr().out


def test_a_huge_file_is_refused_by_its_size(stored, capsys):
    with (stored.files / "manifest.json").open("r+b") as file:
        file.truncate(2 << 20)
    stored.forge()
    assert "at most 1048576 bytes, but got 2097152" in refused(stored, capsys)


def change_scales(stored):
    path = stored.files / "qconfig" / "scales.json"
    scales = json.loads(path.read_text())
    scales["conv1"] *= 1.0000001
    path.write_text(json.dumps(scales, sort_keys=True, separators=(",", ":")))
    from qflow.core.record import digest

    stored.store.client.set_tag(stored.run, "qflow.scales", digest(scales))


def change_metric(stored):
    result = json.loads(stored.tags["qflow.result"])
    result["outcome"]["metrics"]["accuracy/drop"] -= 1e-12
    stored.store.client.set_tag(stored.run, "qflow.result", json.dumps(result))


def log_nan(stored):
    stored.store.client.log_metric(stored.run, "cost/latency_ms", float("nan"), step=10**6)


def log_more(name, value):
    return lambda stored: stored.store.client.log_metric(stored.run, name, value)


WRONG = {
    "scales": (change_scales, "the calibrated scales differ from those of the run at conv1"),
    "a metric": (change_metric, "accuracy/drop was logged as"),
    "weights": (lambda s: flip(s.files / "qconfig" / "weights.safetensors"), "weights.safetensors differs"),
    "the cost": (lambda s: s.edit("cost.json", "[", "[ "), "cost.json differs"),
    "one more on the run": (log_more("cost/board_ms", 1.0), "cost/board_ms of the run is 1, its result has none"),
    "NaN as one more": (log_more("my/note", math.nan), "my/note of the run is nan, its result has none"),
    "NaN on the run": (log_nan, "cost/latency_ms of the run is nan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_numbers_that_are_not_rebuilt_are_anomalous(case, stored, capsys):
    change, says = WRONG[case]
    change(stored)
    stored.forge()
    assert stored.promote() == 1
    out = capsys.readouterr().out
    assert says in out and "verdict     ANOMALOUS" in out
    assert stored.registered() == []


def test_a_report_reads_no_environment(stored, tmp_path, monkeypatch):
    """The report of a study is written from its runs, which somebody else may have written."""
    from qflow.study.report import write_report
    from qflow.tracking.mlflow_tracker import MlflowTracker

    monkeypatch.setenv("MY_SECRET", "hunter2")
    tracker = MlflowTracker.open(None, stored.root, "digits")
    study = tracker.find_study("digits/int8_int16")
    path = tracker.download(study, "config.yaml", tmp_path)
    before = path.read_text()
    for secret in ("${oc.env:MY_SECRET}", r'"\x24{oc.env:MY_SECRET}"'):
        path.write_text(before.replace("registered_model: digits", f"registered_model: {secret}"))
        tracker.log_study(study, folder=tmp_path)
        with pytest.raises(BundleError, match="an interpolation"):
            write_report(tracker, "digits/int8_int16", study, tmp_path)
    path.write_text(before)
    tracker.log_study(study, folder=tmp_path)


@pytest.mark.parametrize("result", ["[" * 50_000, "{}", "[]", "no JSON", '{"outcome": 3}'])
def test_a_result_that_qflow_did_not_write_is_refused(result, stored, capsys):
    stored.store.client.set_tag(stored.run, "qflow.result", result)
    assert "The result of a run is one that qflow wrote" in refused(stored, capsys)
