"""A study goes from one store to another as one file, and is the same there."""

import json
import shutil
import time
import zipfile

import pytest
from support.compose import compose
from support.stored import TINY, store_trial, uri_of

import qflow
from qflow.core.errors import BundleError, TrackingError
from qflow.search.carried import study_record
from qflow.search.reconcile import check_invariants
from qflow.study.archive import pack, unpack
from qflow.study.start import open_session
from qflow.tracking.mlflow_tracker import MlflowTracker

pytestmark = pytest.mark.slow  # works with stores
STUDY = "digits/int8_int16"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run, _ = store_trial(folder, "task=digits")
    assert pack(None, folder, STUDY, folder / "study.zip") == 1
    return folder, run


def tracker_of(folder):
    return MlflowTracker.open(None, folder, "digits")


def test_an_imported_study_is_the_same_and_continues(packed, tmp_path):
    folder, run = packed
    assert unpack(None, tmp_path, folder / "study.zip") == (STUDY, 1)
    old, new = tracker_of(folder), tracker_of(tmp_path)
    old_run, new_run = old.find_study(STUDY), new.find_study(STUDY)
    assert new.run_params(new_run) == old.run_params(old_run)
    assert new.run_metrics(new_run) == old.run_metrics(old_run)
    best = new.run_tags(new_run)["qflow.best"]
    assert best != run
    assert new.run_metrics(best) == old.run_metrics(run)
    before, after = old.run_tags(run), new.run_tags(best)
    assert after["mlflow.parentRunId"] == new_run
    data = [
        {i.dataset.name: i.dataset.digest for i in t._run(r).inputs.dataset_inputs}
        for t, r in ((old, run), (new, best))
    ]
    assert data[0] == data[1] != {}
    assert {k: v for k, v in after.items() if k != "mlflow.parentRunId"} == {
        k: v for k, v in before.items() if k != "mlflow.parentRunId"
    }
    mine, theirs = study_record(tmp_path, STUDY), study_record(folder, STUDY)
    assert json.loads(json.dumps(mine).replace(best, run)) == theirs
    assert qflow.scales(qflow.load(best, uri=uri_of(tmp_path))) == qflow.scales(qflow.load(run, uri=uri_of(folder)))

    config = compose("+experiment=int8_int16", "task=digits", f"root={tmp_path}", *TINY)
    with open_session(config, time.perf_counter()) as session:
        session.evaluator.measure_float()
        assert session.evaluator.prepared is not None
        session.open()
        assert [trial.run_id for trial in session.trials] == [best]
        assert session.best.run_id == best
        assert session.measure({"qconfig.int16_ratio": 1.0}).number == 1
        assert check_invariants(session.study, session.tracker) == []


def test_a_study_that_exists_is_not_overwritten(packed):
    folder, _ = packed
    with pytest.raises(BundleError, match=f"got {STUDY}, which exists"):
        unpack(None, folder, folder / "study.zip")
    with pytest.raises(BundleError, match="which exists. Name another"):
        pack(None, folder, STUDY, folder / "study.zip")
    with pytest.raises(TrackingError, match="none of that name: other"):
        pack(None, folder, "other", folder / "other.zip")


def changed(source, target, change):
    """A copy of an archive in which `change` has replaced contents by name."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        contents = {name: old.read(name) for name in old.namelist()}
        change(contents)
        for name, content in contents.items():
            new.writestr(name, content)
    return target


def other_scales(contents):
    name = next(n for n in contents if n.endswith("scales.json"))
    contents[name] = contents[name].replace(b"0", b"1", 1)


def other_record(contents):
    contents["study.json"] = contents["study.json"].replace(b'"qflow.goal": "met"', b'"qflow.goal": "lost"')


def escape(contents):
    contents["../evil.txt"] = b"x"


def lost(contents):
    del contents[next(n for n in contents if n.endswith("config.yaml"))]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_scales, "another content of"),
        (other_record, "another digest"),
        (escape, "the file ../evil.txt"),
        (lost, "other files than it lists"),
    ],
)
def test_a_damaged_bundle_is_refused_before_anything_is_written(packed, tmp_path, change, said):
    bundle = changed(packed[0] / "study.zip", tmp_path / "bad.zip", change)
    with pytest.raises(BundleError, match=said) as refused:
        unpack(None, tmp_path / "store", bundle)
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.zip"]


def test_a_failed_import_leaves_no_study(packed, tmp_path, monkeypatch):
    def fails(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("qflow.study.archive.restore_study", fails)
        with pytest.raises(KeyboardInterrupt):
            unpack(None, tmp_path, packed[0] / "study.zip")
    assert tracker_of(tmp_path).find_study(STUDY) is None
    assert unpack(None, tmp_path, packed[0] / "study.zip") == (STUDY, 1)
    shutil.rmtree(tmp_path)
