"""Which names and paths of a run are the caller's, and that nothing is imported before all of them are."""

import sys

import pytest

from qflow.bundle.targets import check_targets, own_packages
from qflow.core.errors import BundleError

ONNX = "qflow.tasks.onnx_model.load"


def named(*names):
    return {"task": [{"_target_": name} for name in names]}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the user's, in one module of which an import has an effect."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import os\nclass Net: pass\n")
    (tmp_path / "mine" / "effect.py").write_text("class Net: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def test_nothing_is_imported_before_all_names_are_checked(package):
    with pytest.raises(BundleError, match="got os.system for task.1"):
        check_targets(named("mine.effect.Net", "os.system"), ["mine"])
    assert "mine" not in sys.modules
    check_targets(named("mine.effect.Net", "mine.Net"), ["mine"])
    assert "mine.effect" in sys.modules
    with pytest.raises(BundleError, match="mine.os.system for task.0._target_, which is defined in posix"):
        check_targets(named("mine.os.system"), ["mine"])


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("mine.models.Net", ["mine"]),
        ("torch.optim.swa_utils.SWALR", ["torch.optim.swa_utils.SWALR"]),
        ("torch.nn.functional.l1_loss", ["torch.nn.functional.l1_loss"]),
        ("builtins.dict", ["builtins.dict"]),
        ("qflow.tasks.task.make_task", ["qflow.tasks.task.make_task"]),
        ("torch.optim.AdamW", []),
        ("qflow.tasks.digits.build_model", []),
    ],
)
def test_what_must_be_allowed_is_the_users_package_or_one_function_of_a_library(name, allowed):
    assert own_packages(named(name)) == allowed
    if allowed != ["mine"]:
        check_targets(named(name), allowed)
    if allowed and allowed != ["mine"]:
        with pytest.raises(BundleError):
            check_targets(named(name, f"{name.rpartition('.')[0]}.other"), allowed)


@pytest.mark.parametrize(
    "path",
    [
        "/dev/zero", "../x.onnx", "a/../../x", "~/x", r"C:\x.onnx", r"\\h\x", "//host/x", " /x", "\t~root/x",
        ".\n./x", "a/b::x",
        r"..\x", "c:x", "local-dir:x", "Local-Dir:/x", "loc\tal-dir:/x", " hf-hub:a/b", "hf_hub:a/b", "file:x",
        "HTTPS://host/x", "s3://b/x", "zip::x",
    ],
)  # fmt: skip
def test_a_path_outside_of_the_working_folder_is_the_callers_or_refused(path):
    config = {"task": {"model": {"_target_": ONNX, "path": path}}}
    with pytest.raises(BundleError, match="files in the working folder alone") as refused:
        check_targets(config)
    assert f"security.allow=[{ONNX}]" in str(refused.value)
    assert own_packages(config) == [ONNX]
    check_targets(config, own_packages(config))
    check_targets(config, own=config)
    with pytest.raises(BundleError, match="files in the working folder alone"):
        check_targets(config, own={"task": {"model": {"_target_": ONNX, "path": "x.onnx"}}})
    check_targets({"task": {"model": {"_target_": ONNX, "path": "models/x.onnx"}}})


@pytest.mark.parametrize(
    "name", ["resnet18.a1_in1k", "google/vit-base", "IMAGENET1K_V1", "data/a..b/x.npz", "a b/c.zip"]
)
def test_a_model_of_a_hub_and_a_file_below_the_working_folder_need_no_permission(name):
    config = {"task": {"model": {"_target_": "qflow.tasks.images.timm_models.build_model", "name": name}}}
    check_targets(config)
    assert own_packages(config) == []
