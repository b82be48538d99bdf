"""A stored trial comes back as the model that was judged, from its files alone."""

import shutil
import stat
import zipfile
from pathlib import Path

import pytest
import torch
from support.stored import store_trial, uri_of

import qflow
from qflow.api.load import prepared_of
from qflow.bundle.source import fetch
from qflow.bundle.write import write_bundle
from qflow.core.errors import BundleError, ConfigError, ModelError, QflowError
from qflow.tasks.digits import build_model
from qflow.trial.frames import evaluate_from_start
from qflow.trial.training import float_weights

pytestmark = pytest.mark.slow  # works with a store

OWN = [
    "task=custom", "task.name=own", "task.model._target_=user_task.model", "task.data._target_=user_task.Data",
    "task.metric._target_=user_task.ErrorRate", "task.batch_size=256",
]  # fmt: skip
TRIALS = {
    "int8": (["task=digits"], {"qconfig.int16_ratio": 0.0}),
    "int16": (["task=digits", "calibration.method=kl"], {"qconfig.int16_ratio": 1.0}),
    "mixed": (
        ["task=digits", "+qconfig.modules={conv2: qint16, dense: qint16}", "calibration.divisor=plugin"],
        {"qconfig.int16_ratio": 0.0},
    ),
    "trained": (["task=dual", "qat=dual", "qat.steps=3"], {"qconfig.int16_ratio": 0.0}),
    "trained, without fused norms": (
        ["task=digits", "qat=dual", "qat.steps=3", "qat.mode=with_bn", "qat.moving_weights=false"],
        {"qconfig.int16_ratio": 1.0},
    ),
    "taught, with learned scales": (
        [
            *("task=digits", "qat=teacher", "qat.steps=3", "qat.learned_scales=300", "qat.dampening=0.1"),
            "qat.teacher.features=[dense]",
        ],
        {"qconfig.int16_ratio": 0.0},
    ),
    "temporal": (["task=temporal"], {"qconfig.int16_ratio": 0.0}),
    "a device of one's own": (
        ["task=digits", "device.rules.int8_outputs=[conv]", "device.cost.clock_ghz=0.5"],
        {"qconfig.int16_ratio": 1.0},
    ),
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    return folder, *store_trial(folder, "task=digits")


def metric(evaluator, model):
    """Metric of `model` on the whole evaluation data, as a trial computes it."""
    return evaluate_from_start(evaluator.task, model, evaluator.eval_batch, lambda _: None).metric


@pytest.mark.parametrize("case", TRIALS)
def test_a_run_comes_back_calibrated_and_computes_the_same_bits(case, tmp_path):
    overrides, point = TRIALS[case]
    run, evaluator = store_trial(tmp_path, *overrides, point=point)
    loaded, trial = qflow.load(f"runs:/{run}", uri=uri_of(tmp_path)), fetch(run, uri=uri_of(tmp_path))
    assert metric(evaluator, loaded) == trial.metrics[f"accuracy/{evaluator.task.metric_name}"]
    assert qflow.scales(loaded) == trial.scales
    assert qflow.cost(loaded).march == "nash-m"
    assert qflow.check(loaded).rows
    if not trial.trained and not evaluator.task.cached_attrs:
        images = torch.stack([evaluator.task.data.evaluation[i][0] for i in range(32)])
        with torch.no_grad(), evaluator.prepared.quantized():
            assert torch.equal(loaded(images), evaluator.prepared(images))
    if "device.cost.clock_ghz=0.5" in overrides:
        assert qflow.cost(loaded).latency_ms == trial.metrics["cost/latency_ms"]


def test_code_of_ones_own_is_given_or_allowed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "support")
    import user_task

    run, evaluator = store_trial(tmp_path, *OWN)
    with pytest.raises(BundleError) as error:
        qflow.load(run, uri=uri_of(tmp_path))
    assert "names user_task.model. In Python, give it as model=... If it is yours, allow its package: " in str(
        error.value
    )
    assert "allow=['user_task'] in qflow.load" in str(error.value)
    wanted = fetch(run, uri=uri_of(tmp_path)).metrics["accuracy/error"]
    for given in ({"allow": ["user_task"]}, {"model": user_task.model}, {"model": user_task.model()}):
        assert metric(evaluator, qflow.load(run, uri=uri_of(tmp_path), **given)) == wanted
    with pytest.raises(BundleError, match="names user_task.model"):
        qflow.load(run, uri=uri_of(tmp_path), allow=["user"])  # a package, not the start of its name


def test_another_model_is_refused(digits):
    folder, run, _ = digits
    other = build_model()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ModelError, match="weights of its trial"):
        qflow.load(run, model=other, uri=uri_of(folder))
    with pytest.raises(ConfigError, match="nn.Module, or a function"):
        qflow.load(run, model=lambda: 3, uri=uri_of(folder))
    with pytest.raises(BundleError, match="runs:/ID, a run id, a folder"):
        qflow.load("nothing", uri=uri_of(folder))
    with pytest.raises(ConfigError, match="device is cpu or a GPU"):
        qflow.load(run, uri=uri_of(folder), device="tpu")
    with pytest.raises(QflowError, match="None|not found|must exist"):
        qflow.load("0" * 32, uri=uri_of(folder))


def test_a_store_that_is_not_there_is_not_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QFLOW_HOME", raising=False)
    with pytest.raises(QflowError, match="A store that is read must exist"):
        qflow.load("models:/perception@champion")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def bundle(digits, tmp_path_factory):
    """A folder with everything but the code."""
    folder, run, evaluator = digits
    trial = fetch(run, uri=uri_of(folder))
    files = tmp_path_factory.mktemp("files")
    for name in trial.files:
        (files / name).parent.mkdir(exist_ok=True)
        shutil.copy(trial.folder / name, files / name)
    place = tmp_path_factory.mktemp("bundle") / "study"
    write_bundle(place, trial, files, float_weights(evaluator.task.model))
    return place


def test_a_folder_and_an_archive_need_no_store_and_no_trained_weights(bundle, digits, tmp_path):
    _, run, evaluator = digits
    archive = shutil.make_archive(str(tmp_path / "study"), "zip", bundle)
    for source in (bundle, archive):
        loaded = qflow.load(source, model=lambda: build_model(epochs=1))  # the weights come from the files
        assert metric(evaluator, loaded) == fetch(source).metrics["accuracy/accuracy"]
    assert fetch(archive).run_id == run


def packed(path, bundle, change):
    """An archive of `bundle` whose entries `change` may add to."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in bundle.rglob("*"):
            if file.is_file():
                archive.write(file, file.relative_to(bundle).as_posix())
        change(archive)


def link(archive):
    entry = zipfile.ZipInfo("profile.report")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(entry, "/etc/passwd")


ARCHIVES = {
    "a parent path": lambda archive: archive.writestr("../outside", "x"),
    "a parent path inside": lambda archive: archive.writestr("qconfig/../../outside", "x"),
    "an absolute path": lambda archive: archive.writestr("/tmp/outside", "x"),
    "a link": link,
    "one name twice": lambda archive: archive.writestr("cost.json", "{}"),
    "a pickle": lambda archive: archive.writestr("model.pkl", "x"),
    "a bomb": lambda archive: archive.writestr("profile.report", b"0" * (65 << 20), zipfile.ZIP_DEFLATED),
    "a huge entry": lambda archive: archive.writestr("example.json2", b"0" * (2 << 20), zipfile.ZIP_DEFLATED),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", ARCHIVES)
def test_archives_that_qflow_did_not_write_are_refused_and_write_nothing_outside(case, bundle, tmp_path):
    packed(tmp_path / "study.zip", bundle, ARCHIVES[case])
    with pytest.raises(BundleError) as error:
        qflow.load(tmp_path / "study.zip")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "outside").exists() and not (tmp_path.parent / "outside").exists()


def test_an_archive_with_a_flipped_byte_is_refused(bundle, tmp_path):
    archive = Path(shutil.make_archive(str(tmp_path / "study"), "zip", bundle))
    with zipfile.ZipFile(archive) as names:
        at = max(names.infolist(), key=lambda entry: entry.compress_size).header_offset
    data = bytearray(archive.read_bytes())
    data[at + 200 : at + 300] = b"\xff" * 100
    archive.write_bytes(data)
    with pytest.raises(BundleError, match="a zip archive that qflow wrote, but got"):
        fetch(archive)


def test_a_folder_is_read_once(bundle, tmp_path):
    """What was checked is what is used, also if the folder changes in between."""
    place = tmp_path / "folder"
    shutil.copytree(bundle, place)
    trial = fetch(place)
    shutil.rmtree(place)
    assert qflow.scales(prepared_of(trial)) == trial.scales
    shutil.copytree(bundle, place)
    (place / "cost.json").unlink()
    (place / "cost.json").symlink_to(bundle / "cost.json")
    with pytest.raises(BundleError, match="a link or device: cost.json"):
        fetch(place)


def test_an_archive_that_is_none_is_refused(tmp_path):
    (tmp_path / "study.zip").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(BundleError, match="a zip archive that qflow wrote"):
        qflow.load(tmp_path / "study.zip")


def test_a_changed_folder_is_refused(bundle, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(bundle, changed)
    weights = bytearray((changed / "qconfig/weights.safetensors").read_bytes())
    weights[-3] ^= 1
    (changed / "qconfig/weights.safetensors").write_bytes(weights)
    with pytest.raises(BundleError, match="as they were written"):
        qflow.load(changed)
    (changed / "example.safetensors").unlink()
    shutil.copy(bundle / "qconfig/weights.safetensors", changed / "qconfig/weights.safetensors")
    with pytest.raises(BundleError, match="input example"):
        qflow.load(changed)
