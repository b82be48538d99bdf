"""Two processes train one prepared model under DistributedDataParallel: the gradients are those of one process."""

import gc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qflow.core.dtype import QDtype
from qflow.core.resolve import resolve
from qflow.core.setter import TemplateSetter
from qflow.core.settings import CalibrationSettings, QatSettings
from qflow.quant.model.calibrate import apply_scales, collect
from qflow.quant.model.prepare import prepare
from qflow.quant.train.learned_scales import LearnedScales

pytestmark = pytest.mark.slow  # starts processes


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


def trained():
    """(prepared model with calibrated int8 quantizers on, 8 images)."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, images = Net().eval(), torch.randn(8, 3, 10, 10)
    prepared = prepare(model, images)
    qconfig = resolve(prepared.graph, [TemplateSetter(QDtype.qint8)], "nash-m")
    apply_scales(prepared, collect(prepared, [(images, 8)]), qconfig, CalibrationSettings())
    return prepared.train(), images


def gradients(model, images, prepared):
    with prepared.quantized():
        model(images).square().mean().backward()
    return {name: p.grad.clone() for name, p in prepared.model.named_parameters()}


def scale_gradient(model, images, prepared):
    learned = LearnedScales.of(prepared, QatSettings(learned_scales=1.0))
    with prepared.quantized(), learned.step():
        model(images).square().mean().backward()
    return learned.logarithms.grad


def worker(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    prepared, images = trained()
    found = gradients(DistributedDataParallel(prepared), images[4 * rank : 4 * rank + 4], prepared)
    scales = scale_gradient(DistributedDataParallel(prepared), images[4 * rank : 4 * rank + 4], prepared)
    torch.save((found, sorted(prepared.ran), scales), f"{results}/{rank}.pt")
    gc.collect()  # a wrapper lies in a reference cycle; one that outlives its group aborts torch at exit, now and then
    dist.destroy_process_group()


def test_two_processes_give_the_gradients_of_one(tmp_path):
    prepared, images = trained()
    alone = gradients(prepared, images, prepared)
    scales = scale_gradient(prepared, images, prepared) * 2**0.5  # of half as many values at a time
    mp.spawn(worker, (tmp_path / "store", tmp_path), nprocs=2)
    (first, ran, ours), (second, _, theirs) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert set(ran) >= {"a", "b", "quant[x]"}
    for name, gradient in alone.items():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], gradient, atol=1e-6), name
    assert torch.equal(ours, theirs) and bool(ours.any())
    torch.testing.assert_close(ours, scales, rtol=1e-3, atol=1e-6)
