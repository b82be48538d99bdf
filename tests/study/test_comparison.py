"""What a comparison says of two trials, on records."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflow.core.dtype import QDtype
from qflow.core.errors import BundleError
from qflow.core.qconfig import OpQConfig, QConfig
from qflow.core.record import to_json
from qflow.study.comparison import Side, compare, side_of_json

MILLISECONDS = st.tuples(*[st.floats(0.001, 10.0)] * 3).map(sorted)


def side(outputs, times=None, scores=(), metric=0.9, sensitivities=None, **manifest):
    times = times or {name: (0.1, 0.1, 0.1) for name in outputs}
    return Side(
        source="x",
        title="a trial",
        qconfig=QConfig("nash-m", {name: OpQConfig(QDtype(d), QDtype.qint8) for name, d in outputs.items()}),
        metrics={
            "accuracy/map": metric,
            "accuracy/drop": 0.95 - metric,
            "cost/bpu_ms": sum(t[1] for t in times.values()),
        },
        times={name: (outputs[name], *three) for name, three in times.items()},
        sensitivities=sensitivities or {},
        manifest={"data": "d", "eval_samples": 100, **manifest},
        scores=tuple(scores),
    )


@given(MILLISECONDS, MILLISECONDS, MILLISECONDS)
def test_the_ratio_of_the_other_way_round_is_the_inverse_and_equal_operators_cancel(one, other, same):
    a = side({"a": "qint8", "b": "qint8"}, {"a": one, "b": same})
    b = side({"a": "qint16", "b": "qint8"}, {"a": other, "b": same})
    there, back = compare(a, b).bpu, compare(b, a).bpu
    assert there.ratio == pytest.approx(1.0 / back.ratio)
    assert there.low <= there.ratio <= there.high
    assert compare(a, a).equal
    unchanged = compare(a, a).bpu
    assert (unchanged.low, unchanged.ratio, unchanged.high) == (1.0, 1.0, 1.0)


def test_a_difference_is_judged_by_pairs_where_scores_exist():
    """Eight of 100 samples changed, all to worse: far beyond the noise of pairs, within that of two shares."""
    hits = [1.0] * 90 + [0.0] * 10
    worse = [0.0] * 8 + hits[8:]
    unpaired = compare(side({"a": "qint8"}), side({"a": "qint16"}, metric=0.82))
    paired = compare(side({"a": "qint8"}, scores=hits), side({"a": "qint16"}, scores=worse, metric=0.82))
    metric = {found.metrics[0].how: found.metrics[0].verdict for found in (unpaired, paired)}
    assert [how.split(",")[0] for how in metric] == ["a binomial bound", "paired by sample"]
    assert [verdict.partition(": ")[2] for verdict in metric.values()] == ["within it", "beyond it"]


def test_what_an_operator_gains_is_its_share_of_the_sensitivities_and_its_time():
    scores = {"a": 3.0, "b": 1.0, "c": math.inf}
    a = side({"a": "qint8", "b": "qint8"}, sensitivities=scores)
    b = side({"a": "qint16", "b": "qint8"}, {"a": (0.1, 0.2, 0.3), "b": (0.1, 0.1, 0.1)})
    (op,) = compare(a, b).operators
    assert (op.before, op.after) == ("qint8/qint8", "qint16/qint8")
    assert op.gain == "removes 75.0% of the int8 sensitivity, costs 100 us"
    (back,) = compare(b, a).operators
    assert back.gain == "adds 75.0% of the int8 sensitivity, saves 100 us"


def test_numbers_of_other_data_have_no_noise_and_a_note():
    found = compare(side({"a": "qint8"}), side({"a": "qint8"}, data="e"))
    assert found.differences == ("their data differ: the numbers are of other things",)
    assert not found.equal
    assert found.metrics[0].noise is None
    assert found.metrics[0].how == "not known: they were evaluated on other data"


def test_scales_weights_and_settings_are_compared():
    one = replace(side({"a": "qint8"}), settings={"calibration.method": "mse"}, files={"calibrated scales": "1"})
    assert compare(one, one).equal
    other = replace(one, settings={"calibration.method": "kl", "qat.steps": 5}, files={"calibrated scales": "2"})
    found = compare(one, other)
    assert found.differences == (
        "calibration.method: mse and kl",
        "qat.steps: - and 5",
        "their calibrated scales differ",
    )
    assert not found.equal


def test_a_trial_that_ended_early_was_not_measured():
    early = replace(side({"a": "qint8"}, metric=0.0), stopped="after 10 of 100 samples")
    found = compare(side({"a": "qint8"}), early)
    assert found.notes == ("a trial ended after 10 of 100 samples: its metric is the worst possible, not measured",)
    assert found.metrics[0].noise is None and found.metrics[0].how == "not known: an evaluation ended early"


def test_equal_qconfigs_without_figures_are_equal(tmp_path):
    (tmp_path / "a.json").write_text(to_json(side({"a": "qint8"}).qconfig))
    found = compare(side_of_json(tmp_path / "a.json"), side_of_json(tmp_path / "a.json"))
    assert found.equal and len(found.notes) == 2
    for text in ("[" * 100_000, "3", "", '{"march": "nash-m", "operators": 1}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(BundleError, match="A .json file holds a qconfig that qflow wrote"):
            side_of_json(tmp_path / "bad.json")
