"""What is read is what would have been computed, bit by bit; what no longer fits is not found."""

import dataclasses
import pickle
import threading
from dataclasses import replace

import pytest
import torch

from qflow.analysis.measures.tables import Finding
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.settings import CalibrationSettings, QConfigSettings, SensitivitySettings, TrialSettings
from qflow.cost_model.model import CostModel
from qflow.search.objective import Goal
from qflow.study.outcome import outcome
from qflow.trial.cache import Cache, read_record, write_record
from qflow.trial.evaluator import Evaluator
from qflow.trial.outputs import outputs_off_under
from qflow.trial.record import RUN_METRICS, Evaluation

SETTINGS = TrialSettings(
    calibration=CalibrationSettings(batch_size=16, steps=4), qconfig=QConfigSettings(int16_ratio=0.4)
)


def start(task, rules, folder, say=print, **changes):
    sensitivity = SensitivitySettings(bad_cases=4, search_samples=32, dtypes=["qint8", "qint16", "float16"])
    evaluator = Evaluator(task, rules, CostModel(), sensitivity_settings=sensitivity, eval_batch=256,
                  default_calibration=SETTINGS.calibration, cache=Cache(folder, say=say))  # fmt: skip
    for name, value in changes.items():
        setattr(evaluator, name, value)
    evaluator.measure_float()
    table = evaluator.rank()
    return evaluator, table, evaluator.run_trial(SETTINGS)


def test_another_start_reads_everything_and_gets_the_same_bits(digits_task, nash_m, tmp_path):
    first, table, trial = start(digits_task, nash_m, tmp_path)
    off = outputs_off_under(first, SETTINGS)
    again, same_table, same = start(digits_task, nash_m, tmp_path)
    assert outputs_off_under(again, SETTINGS) == off > 0.0
    assert (sum(again.cache.misses.values()), again.evaluations) == (0, 0)
    assert (trial.evaluated, same.evaluated, again.hits) == (True, False, 1)
    assert (same_table, replace(same, evaluated=True)) == (table, trial)
    other, fresh_table, fresh = start(digits_task, nash_m, None)
    assert (fresh_table, fresh, outputs_off_under(other, SETTINGS)) == (table, trial, off)


def test_exactly_what_depends_on_a_change_is_computed_again(digits_task, nash_m, tmp_path):
    start(digits_task, nash_m, tmp_path)
    settings = SensitivitySettings(bad_cases=4, search_samples=32, metric="MSE", dtypes=["qint8"])
    other, *_ = start(digits_task, nash_m, tmp_path, sensitivity_settings=settings)
    assert set(other.cache.misses) <= {"badcases", "sensitivity", "evaluation"}
    assert other.cache.hits["calibration"] and other.cache.hits["float"]

    class Strict(type(digits_task.metric)):
        """Another metric: its name is no other, its code is."""

        def __call__(self, outputs, batch):
            return super().__call__(outputs, batch) * 0.5

    metric, *_ = start(replace(digits_task, metric=Strict()), nash_m, tmp_path)
    assert metric.cache.misses["float"] == metric.cache.misses["evaluation"] == 1


def test_a_file_that_is_cut_is_computed_again(digits_task, nash_m, tmp_path):
    _, _, trial = start(digits_task, nash_m, tmp_path)
    for file in tmp_path.rglob("*.*"):
        file.write_bytes(file.read_bytes()[:20])
    said = []
    again, _, same = start(digits_task, nash_m, tmp_path, say=said.append)
    assert same == trial
    assert again.evaluations == 1
    assert len(said) == 5 and all("cannot be read and is computed again: SafetensorError" in line for line in said)


def test_what_is_stored_comes_back_bit_by_bit_and_is_no_pickle(digits_task, nash_m, tmp_path):
    evaluator, table, _ = start(digits_task, nash_m, tmp_path)
    stats = evaluator.calibrate(SETTINGS.calibration)
    for content in (stats, table, evaluator.badcases, Evaluation(0.1 + 0.2, 3, {"tensor": 5}), Evaluation(-0.0, 1)):
        place = tmp_path / "record.safetensors"
        write_record(place, content)
        found = read_record(place, type(content))
        assert same_bits(plain_parts(found), plain_parts(content))
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} == {".safetensors"}
    assert not [file for file in tmp_path.rglob("*.safetensors") if b"cnumpy" in file.read_bytes()[:4096]]


def plain_parts(record):
    return dataclasses.asdict(record)


def same_bits(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same_bits(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same_bits, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


def test_a_trial_from_disk_counts_as_no_evaluation(digits_task, nash_m, tmp_path):
    goal = Goal(max_drop=0.01).aimed("accuracy/accuracy", "maximize", ("accuracy/accuracy", *RUN_METRICS))
    for expected in ("true", "false"):
        evaluator, _, trial = start(digits_task, nash_m, tmp_path)
        tags = outcome(trial, goal, "accuracy/accuracy", {}, evaluator.eval_samples).tags
        assert tags["qflow.evaluated"] == expected


@pytest.mark.parametrize(
    "foreign",
    [b"", b"nonsense", pickle.dumps((0.99, 597)), b"\x02\0\0\0\0\0\0\0{}", "other record", "other tensors"],
)
def test_a_foreign_file_is_a_miss_that_is_said(foreign, tmp_path):
    said = []
    cache = Cache(tmp_path, say=said.append)
    cache.get("float", 1, lambda: Evaluation(0.5, 2), Evaluation)
    (file,) = tmp_path.rglob("*.safetensors")
    if isinstance(foreign, bytes):
        file.write_bytes(foreign)
    else:
        write_record(file, Finding("a", "b", "c") if foreign == "other record" else {"metric": torch.zeros(1)})
    again = Cache(tmp_path, say=said.append)
    assert again.get("float", 1, lambda: Evaluation(0.5, 2), Evaluation) == Evaluation(0.5, 2)
    assert (again.misses["float"], len(said)) == (1, 1)
    assert "cannot be read and is computed again" in said[0]
    assert Cache(tmp_path).get("float", 1, lambda: Evaluation(0.0, 0), Evaluation) == Evaluation(0.5, 2)


def test_a_file_under_the_name_of_another_key_is_a_miss_that_is_said(tmp_path):
    said = []
    cache = Cache(tmp_path, say=said.append)
    for key, metric in ((1, 0.5), (2, 0.9)):
        cache.get("float", key, lambda: Evaluation(metric, 2), Evaluation)  # noqa: B023  # called at once
    one, two = tmp_path.rglob("*.safetensors")
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)
    again = Cache(tmp_path, say=said.append)
    assert [again.get("float", key, lambda: Evaluation(0.1, 2), Evaluation).metric for key in (1, 2)] == [0.1, 0.1]
    assert len(said) == 2 and all("belongs to another key" in line for line in said)


def test_a_flipped_bit_anywhere_never_gives_another_record(tmp_path):
    place = tmp_path / "float" / "key.safetensors"
    write_record(place, content := {"a": torch.arange(3.0), "b": torch.tensor(7, dtype=torch.int8)})
    kept = place.read_bytes()
    for position in range(len(kept)):
        changed = bytearray(kept)
        changed[position] ^= 1 << position % 8
        place.write_bytes(changed)
        try:
            found = read_record(place, dict)
        except Exception:  # a miss
            continue
        assert same_bits(found, content), position


def test_a_link_is_a_miss_that_is_said(tmp_path):
    said = []
    Cache(tmp_path).get("float", 1, lambda: Evaluation(0.5, 2), Evaluation)
    (file,) = tmp_path.rglob("*.safetensors")
    file.rename(tmp_path / "aside")
    file.symlink_to(tmp_path / "aside")
    assert Cache(tmp_path, say=said.append).get("float", 1, lambda: Evaluation(0.1, 2), Evaluation).metric == 0.1
    assert "it is no file of its own" in said[0]


def test_what_cannot_be_stored_stays_in_memory_and_is_said(tmp_path):
    said = []
    cache = Cache(tmp_path, say=said.append)
    for _ in range(2):
        assert cache.get("float", 1, lambda: Evaluation(0.5, 2, {"a": float("nan")}), Evaluation).samples == 2
    assert (cache.misses["float"], cache.hits["float"], list(tmp_path.rglob("*.safetensors"))) == (1, 1, [])
    (line,) = said
    assert line.startswith("cache        float is kept in memory only: A record holds finite numbers or infinity")
    assert line.endswith("NaN for record.overflowed.a.")


def test_a_metric_that_nothing_identifies_is_not_kept_on_disk(digits_task, nash_m, tmp_path):
    class Locked(type(digits_task.metric)):
        def __init__(self):
            object.__setattr__(self, "lock", threading.Lock())

    said = []
    evaluator, *_ = start(replace(digits_task, metric=Locked()), nash_m, tmp_path, say=said.append)
    assert said == ["cache        in memory only: task.metric.lock (lock) cannot be recognised at the next start"]
    assert list(tmp_path.iterdir()) == []
    assert evaluator.training_folder("train") is None


def test_an_error_share_is_the_cheapest_mix_that_keeps_so_much(digits_task, nash_m):
    evaluator, *_ = start(digits_task, nash_m, None)
    counts = []
    for share in (0.0, 0.1, 0.5, 1.0):
        settings = QConfigSettings(error_share=share)
        problem = evaluator.precisions.problem(settings)
        chosen = evaluator.resolve(settings)[0].names(QDtype.qint16)
        mix = "".join("6" if name in chosen else "8" for name in evaluator.precisions.promotable)
        assert problem.error(mix) <= problem.budget(share) * (1 + 1e-6)
        assert evaluator.resolve(QConfigSettings(assignment=mix))[1].digest == evaluator.resolve(settings)[1].digest
        counts.append(mix.count("6"))
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0


def test_fp16_goes_where_it_takes_most_error_away_and_the_ratio_counts_the_others(digits_task, nash_m):
    evaluator, table, _ = start(digits_task, nash_m, None)
    order = evaluator.precisions.float16_order
    gains = [table.activation_scores("qint16")[n] - table.activation_scores("float16")[n] for n in order]
    assert gains == sorted(gains, reverse=True)
    assert all(gain > 0 for gain in gains)
    if order:
        _, applied = evaluator.resolve(QConfigSettings(float16_count=1, int16_ratio=1.0))
        assert applied.ops[order[0]].output == QDtype.float16
    evaluator.sensitivities = None
    with pytest.raises(ConfigError, match=r"fp16 count needs sensitivities at int16.*sensitivity.dtypes"):
        evaluator.resolve(QConfigSettings(float16_count=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"assignment": "86x"}, "is made of 8"),
        ({"assignment": "86", "int16_ratio": 0.5}, "got two of"),
        ({"error_share": 1.5}, "error_share lies between 0 and 1"),
        ({"float16_count": -1}, "float16_count lies between"),
    ],
)
def test_what_contradicts_itself_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        QConfigSettings(**settings)


def test_an_assignment_of_another_model_is_refused(digits_task, nash_m):
    evaluator, *_ = start(digits_task, nash_m, None)
    with pytest.raises(ConfigError, match="a letter for each of the .* operators that can be int16, but got 3"):
        evaluator.resolve(QConfigSettings(assignment="868"))
