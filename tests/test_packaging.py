"""conf/ and workflows/ lie inside qflow in a wheel, and are found from any folder there and in an editable install."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # starts commands as processes of their own

ROOT = Path(__file__).parent.parent
SHOW = ["-m", "qflow.tune", "--cfg", "job", "+experiment=int8_int16"]
FIND = ["-c", "from qflow.commands.tune import find_workflow; print(find_workflow('int8_int16').__file__)"]


def python(*arguments, cwd, **env):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = {".git", ".venv", "qflow_out", "build", "qflow.egg-info"}
    import shutil

    shutil.copytree(ROOT, source, ignore=lambda _, names: ignored & set(names))
    python(
        "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source),
        cwd=folder,
    )  # fmt: skip
    (made,) = folder.glob("*.whl")
    return made


def test_a_wheel_has_one_top_level_name_and_all_files(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"qflow"}
    assert {f"qflow/conf/{p.relative_to(ROOT / 'conf')}" for p in (ROOT / "conf").rglob("*.yaml")} <= set(names)
    for folder in ("qflow", "workflows"):
        for path in (ROOT / folder).rglob("*.py"):
            inside = str(path.relative_to(ROOT))
            assert (inside if folder == "qflow" else f"qflow/{inside}") in names, inside
    assert "qflow/tasks/perception/weights.safetensors" in names
    assert "qflow/tasks/perception/fashion.npz" in names


def test_an_installed_wheel_finds_conf_and_workflows_from_any_folder(wheel, tmp_path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel), cwd=tmp_path)
    shown = python(*SHOW, cwd=elsewhere, PYTHONPATH=str(target))
    assert "workflow: int8_int16" in shown
    found = python(*FIND, cwd=elsewhere, PYTHONPATH=str(target))
    assert found.strip() == str(target / "qflow" / "workflows" / "int8_int16.py")


def test_an_editable_install_finds_them_too(tmp_path):
    assert "workflow: int8_int16" in python(*SHOW, cwd=tmp_path)
    assert python(*FIND, cwd=tmp_path).strip() == str(ROOT / "workflows" / "int8_int16.py")
