"""Records as an analysis writes them, made up: long dotted names, fused members, several kinds of quantizers."""

from dataclasses import fields

import numpy as np

from qflow.analysis.measures.advice import Advice
from qflow.analysis.measures.tables import BadcaseTable, Finding, LayerRow, LayerTable, SensitivityRow, SensitivityTable

EMPTY = {field.name: None for field in fields(LayerRow)}


def names(count):
    parts = ("conv1", "bn1", "relu", "conv2", "bn2", "add")
    return [f"backbone.encoder.layer{i // 18 + 1}.{i // 6 % 3}.residual_branch.{parts[i % 6]}" for i in range(count)]


def layer_row(index, name, error, single, quantizer=None, **more):
    kind = f"torch.nn.modules.conv.{name.rsplit('.', 1)[-1].title()}"
    values = {**EMPTY, "Cosine": 0.99, "SQNR": 31.5, "Atol": 0.02}
    values |= {"index": index, "mod_name": name, "base_op_type": kind, "analy_op_type": f"fake {kind}"}
    values |= {"shape": (1, 64, 56, 56), "quant_dtype": "qint8", "qscale": 0.031}
    values |= {"quantizer": name if quantizer is None else quantizer, "error": error, "single_error": single}
    return LayerRow(**values | more)


def layers(count, start=None):
    """A table whose error jumps at operator `start` (a third of the way) and then is carried."""
    random, called = np.random.default_rng(0), names(count)
    start = count // 3 if start is None else start
    error, rows = 0.004, []
    for i, name in enumerate(called):
        single = float(random.lognormal(-6, 0.7)) * (60 if i in (start, start + 1, count - 2) else 1)
        error = float(np.hypot(error, single) * random.uniform(0.93, 1.03))
        fused = i % 6 in (0, 3)
        rows.append(
            layer_row(i, name, None if fused and i % 4 else error, None if fused else single, "" if fused else name)
        )
    findings = (Finding(called[start], "check", "the error grows from 0.004 to 0.15"),)
    return LayerTable(samples=4, rows=tuple(rows), start=called[start], findings=findings)


def sensitivity(count, exact=True):
    random, rows = np.random.default_rng(1), []
    for i, name in enumerate(names(count)):
        for kind in ("activation", "weight") if i % 6 in (0, 3) else ("activation",):
            for dtype, share in (("qint8", 1.0), ("qint16", 0.004)):
                score = float(random.lognormal(-7, 2)) * share
                sure = exact or score > 1e-3
                rows.append(
                    SensitivityRow(name, kind, "Conv2d", score, dtype, 10**8, 0.3 * score, sure, (("out", score),))
                )
    rows.sort(key=lambda row: -row.score)
    findings = () if exact else (Finding("", "info", "60 % of the rows are estimated"),)
    return SensitivityTable("Cosine", "mean over outputs", 4, exact, tuple(rows), findings=findings)


def badcases():
    return BadcaseTable(
        samples=256, index={"heads.boxes": {"Cosine": 17, "L1": 203}, "heads.scores": {"Cosine": 17, "L1": 4}},
        value={"heads.boxes": {"Cosine": 0.913, "L1": 0.31}, "heads.scores": {"Cosine": 0.977, "L1": 0.02}},
        worst={"Cosine": 17, "L1": 203}, metric="Cosine", chosen=(17, 203),
    )  # fmt: skip


def advice(count=3):
    return [
        Advice(
            name, "truncation", "activation", (("range", 41.5), ("scale", 0.00312), ("clipped", 0.031)),
            "values reach 41.5 but the scale ends at 0.4: take int16, or a wider calibration",
            f"qconfig.modules={{{name}: qint16}}" if i % 3 else "", 0.4 / (i + 1),
        )
        for i, name in enumerate(names(count))
    ]  # fmt: skip
