"""fp16 where the vector unit can: rounding, overflow that is counted, clipping, casts at the borders."""

import pytest
import torch
from torch import nn

import qflow
from qflow.core.errors import ConfigError


class Norm(nn.Module):
    def __init__(self, gain=1.0):
        super().__init__()
        self.inner, self.norm, self.out = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)
        with torch.no_grad():
            self.norm.weight.fill_(gain)

    def forward(self, x):
        return self.out(self.norm(self.inner(x)))


def prepared_with(gain=1.0, name="norm", **settings):
    torch.manual_seed(0)
    model, example = Norm(gain).eval(), torch.randn(8, 16)
    setter = qflow.ModuleNameQconfigSetter({name: qflow.get_qconfig(out_dtype="float16", weight_dtype=None)})
    prepared = qflow.prepare(model, example, setter)
    qflow.calibrate(prepared, [example], qflow.CalibrationSettings(method="minmax", **settings))
    return model, prepared, example


def test_a_layer_norm_in_fp16_between_int8_operators():
    _, prepared, example = prepared_with()
    seen = {}
    with torch.no_grad():
        handle = prepared.model.norm.register_forward_hook(lambda m, a, out: seen.update(norm=out))
        prepared(example)
        handle.remove()
    assert torch.equal(seen["norm"], seen["norm"].half().float())
    rows = {row.op: row for row in qflow.check(prepared).rows}
    assert (rows["norm"].input_dtype, rows["norm"].applied) == ("qint8", "float16")
    casts = {op.op: op.cast_elements for op in qflow.cost(prepared).ops}
    assert casts["norm"] > 0  # int8 to fp16 on the way in
    assert casts["out"] > 0  # and back before the GEMM


def test_overflow_is_counted_or_clipped():
    _, prepared, example = prepared_with(gain=1e5)
    with torch.no_grad():
        prepared(example)
    assert prepared.overflowed["norm.weight_mul"] > 0  # the product with the weight, before the bias is added
    _, prepared, example = prepared_with(gain=1e5, float16_clip=True)
    with torch.no_grad():
        assert torch.isfinite(prepared(example)).all()


def test_fp16_in_the_gemm_engine_is_refused():
    with pytest.raises(ConfigError, match="fp16"):
        prepared_with(name="inner")
