import torch
from support.models import ResNet, revive
from support.training import calibrated, data, loss, same

from qflow.analysis.advice.qat_debug import qat_debug
from qflow.core.settings import QatSettings
from qflow.quant.trace.calling import call_model


def test_qat_debug_finds_the_stage_at_fault():
    torch.manual_seed(0)
    model = revive(ResNet())
    prepared, _ = calibrated(model, torch.randn(4, 3, 16, 16))
    held = list(data(6))

    def evaluate(net):
        with torch.no_grad():
            return -sum(float(loss(call_model(net, x), b)) for x, b in held) / len(held)

    state = {k: v.clone() for k, v in prepared.state_dict().items()}
    common = dict(batches=lambda: list(data()), build=lambda g: torch.optim.SGD(g), evaluate=evaluate, tolerance=0.05)
    settings = QatSettings(steps=6, learning_rate=0.01)
    found = qat_debug(model, prepared, loss=loss, settings=settings, **common)
    assert [s.name for s in found.stages] == ["float fine-tune", "fake quant off", "rate 0", "rate 0, moving", "qat"]
    assert all(s.passed for s in found.stages) and found.verdict.startswith("No stage is at fault")
    assert found.stages[2].metric == found.calibrated_metric
    assert same(prepared.state_dict(), state) and not prepared.training
    assert found.stages[4].metric >= found.calibrated_metric - found.tolerance
    assert "goal" not in found.verdict
    found = qat_debug(model, prepared, loss=loss, settings=settings, goal=-1.0, **common)  # out of reach
    assert found.verdict.startswith("No stage is at fault") and "the goal of -1 is missed" in found.verdict
    met = qat_debug(model, prepared, loss=loss, settings=settings, goal=9.0, **common)
    assert met.verdict.endswith("the goal of 9 is met.")
    found = qat_debug(model, prepared, loss=lambda o, b: -10 * loss(o, b), settings=settings, **common)
    assert not found.stages[0].passed and found.verdict.startswith("The pipeline is at fault")
    assert found.stages[2].passed
