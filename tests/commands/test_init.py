"""What `init` writes: a task of each kind that runs as it is, all files or none, and nothing over what is there."""

import json

import pytest
import torch
from support.commands import run_qflow

from qflow.commands.init import write_new
from qflow.core.errors import ConfigError
from qflow.tasks.starters.files import KINDS


@pytest.mark.slow  # starts commands as processes of their own
@pytest.mark.parametrize("kind", KINDS)
def test_a_study_of_what_was_written_runs(kind, tmp_path):
    done = run_qflow("init", kind, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split(maxsplit=1)[1] == "python -m qflow.tune +experiment=int8_int16 task=mine"
    short = ["repair=none", "sensitivity.bad_cases=2", "calibration.steps=2"]
    if kind == "detection":  # without the training of the example, and on few of its pictures
        pytest.importorskip("pycocotools", reason="the extra `detection` is not installed")
        from qflow.tasks.starters.detection import Detector

        torch.save(Detector().state_dict(), tmp_path / "my_weights.pt")
        short += ["task.data.calibration_size=16", "task.data.evaluation_size=16"]
    done = run_qflow("tune", "+experiment=int8", "+debug=tiny", "task=mine", *short, "--json", cwd=tmp_path)
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)["result"]["baselines"]
    assert {name for one in found.values() for name in one["metrics"] if name.startswith("accuracy/")} == {
        "accuracy/drop", f"accuracy/{dict(zip(KINDS, ('top1', 'map', 'agreement_cosine'), strict=True))[kind]}",
    }  # fmt: skip


def test_all_files_are_written_or_none(tmp_path):
    (tmp_path / "conf").mkdir()
    files = {"my_task.py": b"x", "conf/task/mine.yaml": b"y", "example/images/1.jpg": b"z"}
    write_new(tmp_path, files)
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    (tmp_path / "my_task.py").unlink()
    with pytest.raises(ConfigError, match="only, but got conf/task/mine.yaml and 1 more in this folder. Take an empty"):
        write_new(tmp_path, files)
    assert not (tmp_path / "my_task.py").exists()


def test_what_was_written_before_a_failure_is_taken_back(tmp_path):
    (tmp_path / "conf").write_text("a file where a folder is needed")
    with pytest.raises(OSError, match="conf"):
        write_new(tmp_path, {"my_task.py": b"x", "new/a": b"", "conf/task/mine.yaml": b"y"})
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]
