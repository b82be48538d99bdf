"""A stored trial comes back as the model that was judged, from its run alone."""

import pytest
import torch
from support.stored import store_trial, uri_of

import qflow
from qflow.core.errors import BundleError, ModelError
from qflow.tasks.digits import build_model
from qflow.trial.frames import evaluate_from_start

pytestmark = pytest.mark.slow  # works with a store


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    return folder, *store_trial(folder, "task=digits")


def outputs(evaluator, model):
    """Metric of `model` on the whole evaluation data, as a trial computes it."""
    return evaluate_from_start(evaluator.task, model, evaluator.eval_batch, lambda _: None)[0]


def test_a_run_comes_back_calibrated_and_computes_the_same_bits(digits):
    folder, run, evaluator = digits
    loaded = qflow.load(f"runs:/{run}", uri=uri_of(folder))
    images = torch.stack([evaluator.task.data.evaluation[i][0] for i in range(64)])
    with torch.no_grad(), evaluator.prepared.quantized():
        assert torch.equal(loaded(images), evaluator.prepared(images))
    assert qflow.scales(loaded) == qflow.scales(evaluator.prepared)
    assert qflow.cost(loaded).latency_ms > 0
    assert qflow.load(run, model=build_model(), uri=uri_of(folder)).applied.digest == loaded.applied.digest


def test_another_model_is_refused(digits):
    folder, run, _ = digits
    other = build_model()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ModelError, match="weights of its trial"):
        qflow.load(run, model=other, uri=uri_of(folder))
    with pytest.raises(BundleError, match="runs:/ID, a run id, a folder"):
        qflow.load("nothing", uri=uri_of(folder))
