"""What is read is what would have been computed, bit by bit; what no longer fits is not found."""

from dataclasses import replace

import pytest

from qflow.bench import Bench
from qflow.cache import Cache
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.settings import CalibrationSettings, QConfigSettings, SensitivitySettings, TrialSettings
from qflow.cost.model import CostModel

SETTINGS = TrialSettings(
    calibration=CalibrationSettings(batch_size=16, steps=4), qconfig=QConfigSettings(int16_ratio=0.4)
)


def start(task, rules, folder, say=print, **changes):
    sensitivity = SensitivitySettings(bad_cases=4, search_samples=32, dtypes=["qint8", "qint16", "float16"])
    bench = Bench(task, rules, CostModel(), sensitivity_settings=sensitivity, eval_batch=256,
                  default_calibration=SETTINGS.calibration, cache=Cache(folder, say=say))  # fmt: skip
    for name, value in changes.items():
        setattr(bench, name, value)
    bench.measure_float()
    table = bench.rank()
    return bench, table, bench.run_trial(SETTINGS)


def test_another_start_reads_everything_and_gets_the_same_bits(digits_task, nash_m, tmp_path):
    _, table, trial = start(digits_task, nash_m, tmp_path)
    again, same_table, same = start(digits_task, nash_m, tmp_path)
    assert (sum(again.cache.misses.values()), again.evaluations) == (0, 0)
    assert (trial.evaluated, same.evaluated, again.hits) == (True, False, 1)
    assert (same_table, replace(same, evaluated=True)) == (table, trial)
    _, fresh_table, fresh = start(digits_task, nash_m, None)
    assert (fresh_table, fresh) == (table, trial)


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


def test_an_error_share_is_the_cheapest_mix_that_keeps_so_much(digits_task, nash_m):
    bench, *_ = start(digits_task, nash_m, None)
    counts = []
    for share in (0.0, 0.1, 0.5, 1.0):
        settings = QConfigSettings(error_share=share)
        problem = bench.precisions.problem(settings)
        chosen = bench.resolve(settings)[0].names(QDtype.qint16)
        mix = "".join("6" if name in chosen else "8" for name in bench.precisions.promotable)
        assert problem.error(mix) <= problem.budget(share) * (1 + 1e-6)
        assert bench.resolve(QConfigSettings(assignment=mix))[1].digest == bench.resolve(settings)[1].digest
        counts.append(mix.count("6"))
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0


def test_fp16_goes_where_it_takes_most_error_away_and_the_ratio_counts_the_others(digits_task, nash_m):
    bench, table, _ = start(digits_task, nash_m, None)
    order = bench.precisions.float16_order
    gains = [table.activation_scores("qint16")[n] - table.activation_scores("float16")[n] for n in order]
    assert gains == sorted(gains, reverse=True)
    assert all(gain > 0 for gain in gains)
    if order:
        _, applied = bench.resolve(QConfigSettings(float16_count=1, int16_ratio=1.0))
        assert applied.ops[order[0]].output == QDtype.float16
    bench.sensitivities = None
    with pytest.raises(ConfigError, match=r"fp16 count needs sensitivities at int16.*sensitivity.dtypes"):
        bench.resolve(QConfigSettings(float16_count=1))


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
    bench, *_ = start(digits_task, nash_m, None)
    with pytest.raises(ConfigError, match="a letter for each of the .* operators that can be int16, but got 3"):
        bench.resolve(QConfigSettings(assignment="868"))
