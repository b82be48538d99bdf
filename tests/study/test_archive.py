"""A study goes from one store to another as one file, and is the same there."""

import json
import shutil
import time
import zipfile
from hashlib import sha256

import pytest
from support.compose import compose
from support.stored import TINY, store_trial, uri_of

import qflow
from qflow.core.errors import BundleError, QflowError, TrackingError
from qflow.core.record import digest
from qflow.search.carried import study_names, study_record
from qflow.search.reconcile import check_invariants
from qflow.search.spool import Record, Spool, spool_of
from qflow.study.archive import pack, unpack
from qflow.study.start import open_session
from qflow.tracking.carried import unfinished
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


def test_the_search_of_a_study_may_be_in_a_database_that_folders_share(packed, tmp_path):
    folder, _ = packed
    shared = tmp_path / "shared.db"
    assert unpack(None, tmp_path / "one", folder / "study.zip", searches=shared) == (STUDY, 1)
    assert (study_names(shared), study_names(tmp_path / "one")) == ([STUDY], [])
    with pytest.raises(TrackingError, match=r"tuned in: root=<folder> or search.storage=<url>"):
        pack(None, tmp_path / "one", STUDY, tmp_path / "again.zip")
    assert pack(None, tmp_path / "one", STUDY, tmp_path / "again.zip", searches=shared) == 1
    with pytest.raises(BundleError, match="which exists"):
        unpack(None, tmp_path / "two", tmp_path / "again.zip", searches=shared)


def test_a_study_that_exists_is_not_overwritten(packed):
    folder, _ = packed
    with pytest.raises(BundleError, match=f"got {STUDY}, which exists"):
        unpack(None, folder, folder / "study.zip")
    with pytest.raises(BundleError, match="which exists. Name another"):
        pack(None, folder, STUDY, folder / "study.zip")
    with pytest.raises(TrackingError, match="A bundled study is in the store, but got other, unknown in"):
        pack(None, folder, "other", folder / "other.zip")


def test_a_study_whose_results_wait_for_the_store_is_no_bundle_yet(packed):
    folder, run = packed
    spool = Spool(spool_of(folder, STUDY), STUDY, tracker_of(folder), True, lambda: None)
    spool.keep(Record(run, 0, "all-int8", "{}", "FINISHED"))
    try:
        with pytest.raises(BundleError, match=r"got 1 that wait in .*spool/digits%2Fint8_int16 to be delivered"):
            pack(None, folder, STUDY, folder / "half.zip")
        assert not (folder / "half.zip").exists()
    finally:
        shutil.rmtree(folder / "spool")


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


def edited(source, target, edit):
    """A copy of an archive whose record `edit` has changed, with a digest that fits."""

    def change(contents):
        record = json.loads(contents["study.json"])
        edit(record, contents)
        content = {key: record[key] for key in ("experiment", "study", "runs", "optuna")}
        contents["study.json"] = json.dumps({**record, "digest": digest(content)}).encode()

    return changed(source, target, change)


def bomb(record, contents):
    contents["files/0/bomb.png"] = b"0" * (257 << 20)
    record["runs"][0]["files"]["bomb.png"] = sha256(contents["files/0/bomb.png"]).hexdigest()


def script(record, contents):
    contents["files/1/evil.sh"] = b"x"
    record["runs"][1]["files"]["evil.sh"] = sha256(b"x").hexdigest()


def of_run(number, **values):
    return lambda record, _: record["runs"][number].update(values)


def of_tags(number, **values):
    return lambda record, _: record["runs"][number]["tags"].update({k.replace("_", "."): v for k, v in values.items()})


FORGED = {
    "a file without end": (bomb, "269484032 bytes, more than 268435456"),
    "an id that is part of other texts": (of_run(1, id="e"), "ids of runs"),
    "another status": (of_run(1, status="RUNNING"), "the status RUNNING"),
    "no time": (of_run(0, start="now"), "without name, start or end"),
    "another parent": (of_tags(1, mlflow_parentRunId="0" * 32), "a trial of another study's run"),
    "another best": (of_tags(0, qflow_best="0" * 32), "a best trial that is none"),
    "no number": (of_tags(1, qflow_trial="x"), "invalid literal"),
    "a result of 50000 levels": (of_tags(1, qflow_result="[" * 7000), "The result of a run is one that qflow"),
    "another study": (of_tags(1, qflow_study="other"), "runs of another study"),
    "a parent folder as a name": (lambda r, _: r.update(study="../x"), "A study name is words"),
    "no experiment": (lambda r, _: r.update(experiment=""), "has 1 to 500 characters"),
    "no Optuna trial": (lambda r, _: r["optuna"]["trials"][0].update(state="DONE"), "one that qflow wrote, but got"),
    "no direction": (lambda r, _: r["optuna"].update(directions=[]), "has a direction"),
    "metrics that are none": (of_run(1, metrics={"a": [["x", 0, 0]]}), "could not convert"),
    "a metric of 400 digits": (of_run(1, metrics={"a": [[10**400, 0, 0]]}), "int too large"),
    "a time beyond all calendars": (of_run(1, start=10**30), "for a time or step"),
    "a time before all others": (of_run(1, end=-1), "for a time or step"),
    "a name with ESC": (of_run(1, name="a\x1b[31m"), "where a store takes another"),
    "a param that is no text": (of_run(1, params={"a": 1}), "the text 1 where a store takes another"),
    "half a character": (of_tags(1, x="a\ud800"), "where a store takes another"),
    "half a character in a search": (lambda r, _: r["optuna"]["user_attrs"].update(x="\ud800"), "no UTF-8"),
    "a value of 400 digits": (lambda r, _: r["optuna"]["trials"][0].update(values=[10**400]), "int too large"),
    "a trial that runs": (lambda r, _: r["optuna"]["trials"][0].update(state="RUNNING"), "a trial that runs"),
    "a search without its trial": (lambda r, _: r["optuna"]["trials"].clear(), "its search of 0 trials"),
    "trials without their search": (lambda r, _: r.update(optuna=None), "trial 0 of a search, and no search"),
    "a script": (script, "the file 'evil.sh', which no run has"),
    "no runs": (lambda r, _: r.update(runs=[]), "no runs"),
    "inputs that are none": (of_run(1, inputs=[{}]), "in"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_bundle_is_refused_before_a_store_is_made(case, packed, tmp_path):
    edit, said = FORGED[case]
    bundle = edited(packed[0] / "study.zip", tmp_path / "bad.zip", edit)
    with pytest.raises(QflowError, match=said) as refused:
        unpack(None, tmp_path / "store", bundle)
    assert str(refused.value).isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["bad.zip"]


def test_a_bundle_with_a_flipped_byte_is_refused(packed, tmp_path):
    data = bytearray((packed[0] / "study.zip").read_bytes())
    data[200:300] = b"\xff" * 100
    (tmp_path / "bad.zip").write_bytes(data)
    with pytest.raises(BundleError, match="A study is imported from a bundle, but got"):
        unpack(None, tmp_path / "store", tmp_path / "bad.zip")


@pytest.mark.parametrize("killed", ["_rename_texts", "publish"])
def test_an_import_that_was_killed_does_not_block_the_name(killed, packed, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(f"qflow.study.archive.{killed}", kill)
        for undone in ("qflow.study.archive.withdraw_study", "qflow.tracking.carried.withdraw_runs"):
            patched.setattr(undone, lambda *_: None)  # a process that is gone removes nothing
        with pytest.raises(Killed):
            unpack(None, tmp_path, packed[0] / "study.zip")
    assert tracker_of(tmp_path).find_study(STUDY) is None
    assert (study_names(tmp_path) == [STUDY]) == (killed == "publish")
    assert unpack(None, tmp_path, packed[0] / "study.zip") == (STUDY, 1)
    tracker = tracker_of(tmp_path)
    run = tracker.run_tags(tracker.find_study(STUDY))["qflow.best"]
    assert run in json.dumps(study_record(tmp_path, STUDY)) and not unfinished(tracker, STUDY)


def test_an_optuna_study_whose_runs_are_elsewhere_is_kept(packed, tmp_path):
    for file in packed[0].glob("optuna.db*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(BundleError, match=f"got {STUDY}, which exists"):
        unpack(None, tmp_path, packed[0] / "study.zip")
    assert study_names(tmp_path) == [STUDY] and not (tmp_path / "mlflow.db").exists()


def test_a_tuned_study_needs_its_optuna_database_and_trials_by_hand_do_not(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("qflow.study.archive.study_names", lambda _: [])
    monkeypatch.setattr("qflow.search.carried.study_names", lambda _: [])
    with pytest.raises(TrackingError, match=f"but got none of {STUDY} in .*optuna.db. Name the folder"):
        pack(None, packed[0], STUDY, tmp_path / "study.zip")
    tracker = tracker_of(packed[0])
    monkeypatch.undo()
    run = tracker.open_study("by/hand", tags={}, params={}, description="")
    trial = tracker.start_trial(run, "by/hand", -1, "by hand")
    tracker.end(trial, "FINISHED")
    tracker.end(run, "FINISHED")
    assert pack(None, packed[0], "by/hand", tmp_path / "hand.zip") == 1
    assert unpack(None, tmp_path / "new", tmp_path / "hand.zip") == ("by/hand", 1)
    assert not (tmp_path / "new" / "optuna.db").exists()
