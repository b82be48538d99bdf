"""The temporal task: where the ball is takes memory, and a study follows the sequences in every step."""

import re

import pytest
import torch
from support.built_once import built_anew
from support.commands import run_qflow

from qflow.config.device_file import load_cost, load_rules
from qflow.core.dtype import QDtype
from qflow.core.settings import CalibrationSettings, SensitivitySettings, TrialSettings
from qflow.study.manifest import manifest
from qflow.tasks.task import make_task
from qflow.tasks.temporal import FRAMES, HELD_OUT, Hit, build_data, build_model, draw
from qflow.trial.diagnosis import Diagnosis
from qflow.trial.evaluator import Evaluator


def evaluator_of(model, data):
    task = make_task(name="temporal", model=model, data=data, metric=Hit(), cached_attrs=("hidden",))
    made = Evaluator(
        task,
        load_rules("nash-m"),
        load_cost("nash-m"),
        sensitivity_settings=SensitivitySettings(bad_cases=3, search_samples=25),
        default_calibration=CalibrationSettings(batch_size=4, steps=20),
        eval_batch=32,
    )
    made.measure_float()
    return made


@pytest.fixture(scope="module")
def evaluator():
    return evaluator_of(build_model(epochs=1), build_data(calibration_size=80))


def hits(model, sequences, forget=False):
    """Share of hits of a loop by hand, one sequence at a time."""
    inner = getattr(model, "model", model)
    images, cells = sequences.tensors
    found = []
    with torch.no_grad():
        for i, image in enumerate(images):
            if i % FRAMES == 0 or forget:
                inner.hidden = None
            found.append(Hit()(model(image[None]), (None, cells[i : i + 1])))
    inner.hidden = None
    return float(torch.cat(found).mean())


def test_scores_are_in_the_order_of_the_samples(evaluator):
    """Sequences are read in parallel, and the noise of a study is paired by sequence."""
    inner, (images, cells) = evaluator.task.model, evaluator.task.data.evaluation.tensors
    found = []
    with torch.no_grad():
        for i in range(2 * FRAMES):
            inner.hidden = None if i % FRAMES == 0 else inner.hidden
            found.append(float(Hit()(inner(images[i : i + 1]), (None, cells[i : i + 1]))))
    inner.hidden = None
    assert list(evaluator.float_scores[: 2 * FRAMES]) == found
    assert manifest(evaluator)["eval_sequences"] == [FRAMES] * HELD_OUT


def test_sequences_are_repeatable_and_begin_with_the_ball_in_sight():
    images, cells = draw(20, seed=3)
    again, _ = draw(20, seed=3)
    assert torch.equal(images, again) and images.shape == (20, FRAMES, 1, 16, 16) and cells.shape == (20, FRAMES)
    peaks = images.amax((2, 3, 4))
    assert (peaks[:, :2] > 0.6).all() and 0.3 < float((peaks < 0.85).float().mean()) < 0.8
    steps = torch.stack([cells // 8, cells % 8]).diff(dim=-1).abs()
    assert steps.max() <= 2  # cells a frame
    data = build_data(calibration_size=30)
    assert data.calibration.sequences == [FRAMES] * 3 and len(data.evaluation) == HELD_OUT * FRAMES
    with pytest.raises(ValueError, match="whole sequences of 10 frames; got 5"):
        build_data(calibration_size=5)


def test_evaluation_is_that_of_a_loop_by_hand(evaluator):
    evaluation = evaluator.task.data.evaluation
    assert evaluator.float_metric == pytest.approx(hits(evaluator.task.model, evaluation), abs=1e-6)
    result = evaluator.run_trial(TrialSettings(calibration=evaluator.default_calibration))
    prepared = evaluator.prepared
    with prepared.quantized():
        assert result.metric == pytest.approx(hits(prepared, evaluation), abs=2e-3)  # another batch, other last bits
    assert result.samples == len(evaluation)
    assert evaluator.task.model.hidden is None and prepared.model.hidden is None


def test_calibration_sees_the_frames_in_order(evaluator):
    stats = evaluator.calibrate(evaluator.default_calibration)
    assert stats.samples == 80 and stats.unseen == ()
    images = evaluator.task.data.calibration.tensors[0].view(8, FRAMES, 1, 16, 16)
    model, largest = evaluator.task.model, 0.0
    with torch.no_grad():
        for t in range(FRAMES):
            if t:
                largest = max(largest, float(model.hidden.abs().max()))
            model(images[:, t])
    model.hidden = None
    assert stats.histograms["quant[self.hidden]"].largest == pytest.approx(largest, rel=1e-5)


def test_bad_cases_are_frames_and_the_analysis_runs_from_the_state_before_them(evaluator):
    diagnosis = Diagnosis(evaluator)
    table = diagnosis.find_badcases()
    assert table.sequences == ((FRAMES, 1), (FRAMES, 1), (5, 1)) and table.samples == 25
    chosen = table.frame(table.chosen[0])
    evaluator.all(QDtype.qint8)
    model, prepared = evaluator.task.model, evaluator.prepared
    images = evaluator.task.data.calibration.tensors[0]
    distances = {}
    with torch.no_grad(), prepared.quantized():
        for i in range(25):
            model.hidden = None if i % FRAMES == 0 else model.hidden
            prepared.model.hidden = None if model.hidden is None else model.hidden.clone()
            got = prepared(images[i : i + 1])
            state, expected = model.hidden, model(images[i : i + 1])
            distances[i] = float((got - expected).abs().mean())
            if i == table.chosen[0]:
                kept = state
    model.hidden = None
    worst = max(distances, key=distances.get)
    assert table.index["0"]["L1"] == worst and table.value["0"]["L1"] == pytest.approx(distances[worst], rel=1e-4)
    case = evaluator.cases()[0]
    assert (case.state["hidden"] is None) == (kept is None) and chosen == (table.chosen[0] // FRAMES, chosen[1])
    assert kept is None or torch.allclose(case.state["hidden"], kept, atol=1e-6)
    assert diagnosis.compare_layers().samples == 1
    assert {row.op_name for row in diagnosis.rank().rows} >= {"quant[image]", "quant[self.hidden]"}


def test_the_state_is_part_of_the_cost(evaluator):
    graph = evaluator.deploy_graph
    assert dict(graph.outputs).keys() == {"0", "self.hidden"} and graph.by_name["quant[self.hidden]"].shape == (
        1,
        16,
        8,
        8,
    )


@pytest.mark.slow
def test_the_network_needs_its_state():
    model = build_model()
    with built_anew():
        again = build_model()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    data = build_data()
    assert hits(model, data.evaluation) > 0.88
    assert hits(model, data.evaluation, forget=True) < 0.65


@pytest.mark.slow
def test_a_study_runs_on_sequences(tmp_path):
    arguments = ["+experiment=int8_int16", "task=temporal", "task.model._target_=qflow.tasks.temporal.build_model"]
    done = run_qflow("tune", *arguments, "search.n_trials=4", cwd=tmp_path)
    assert done.returncode in (0, 1), done.stderr + done.stdout
    assert re.search(r"^float +hit 0\.\d+ on 960 samples of temporal", done.stdout, re.MULTILINE)
    assert re.search(r"^bad cases +the 16 worst of 256 samples", done.stdout, re.MULTILINE)
    assert re.search(r"^all-int8 ", done.stdout, re.MULTILINE)
    shown = run_qflow("analyze", "+experiment=int8_int16", "task=temporal", "stages=[badcase]", cwd=tmp_path)
    assert re.search(r"the 16 worst of 256 samples by L1: \[\d+:\d, \d+:\d", shown.stdout), shown.stdout + shown.stderr
    refused = run_qflow("tune", *arguments, "qat.steps=5", "qat.loss._target_=qflow.tasks.digits.loss", cwd=tmp_path)
    assert refused.returncode == 2 and "but got a model with state, task.cached_attrs=['hidden']" in refused.stderr
