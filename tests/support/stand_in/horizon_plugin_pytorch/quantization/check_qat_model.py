"""model_check_result.txt: the dtypes that a prepared model computes with."""

import copy
from pathlib import Path

import torch

from horizon_plugin_pytorch.quantization.fake_quantize import FakeCast, FakeQuantState, set_fake_quantize

OUTPUT = ("Module Name", "Module Type", "Input dtype", "out dtype", "ch_axis", "observer")
WEIGHT = ("Module Name", "Module Type", "weight dtype", "ch_axis", "observer")


def psql(columns, rows):
    """A table in the layout that tabulate calls psql."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]

    def line(cells):
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    edge, rule = ("{}" + "+".join("-" * (w + 2) for w in widths) + "{}" for _ in range(2))
    return "\n".join(
        [edge.format("+", "+"), line(columns), rule.format("|", "|"), *map(line, rows), edge.format("+", "+")]
    )


def check_qat_model(model, example_inputs=None, example_kw_inputs=None, save_results=False, out_dir=None):
    copied = copy.deepcopy(model)
    set_fake_quantize(copied.eval(), FakeQuantState._FLOAT)
    copied(*_positional(example_inputs), **(example_kw_inputs or {}))
    outputs = [_output_row(node) for node in model.qat_nodes if _has_output(node)]
    weights = [_weight_row(node) for node in model.qat_nodes if _weight(node) is not None]
    text = "All fusable modules are fused in model!\n\n"
    text += f"Each layer out qconfig:\n{psql(OUTPUT, outputs)}\n\nWeight qconfig:\n{psql(WEIGHT, weights)}\n"
    if save_results:
        (Path(out_dir or ".") / "model_check_result.txt").write_text(text)


def _positional(inputs):
    return () if inputs is None else tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def _has_output(node):
    return hasattr(node.module, "activation_post_process")


def _weight(node):
    return getattr(node.module, "weight_fake_quant", None)


def _dtype(quantizer):
    return torch.float32 if quantizer is None else quantizer.get_dtype()


def _observer(quantizer):
    if isinstance(quantizer, FakeCast):
        return "FakeCast"
    observer = quantizer.activation_post_process
    return f"{type(observer).__name__}(averaging_constant={observer.averaging_constant})"


def _output_row(node):
    own = node.module.activation_post_process
    name = f"{node.name}[{node.method}]" if node.method else node.name
    given = [_dtype(_output_of(producer)) for producer in node.inputs]
    rest = ["qconfig = None", ""] if own is None else [getattr(own, "ch_axis", -1), _observer(own)]
    return [name, type(node.module).__name__, str([str(d) for d in given]), _dtype(own), *rest]


def _output_of(producer):
    while producer is not None and not hasattr(producer.module, "activation_post_process"):
        producer = producer.inputs[0] if producer.inputs else None
    return None if producer is None else producer.module.activation_post_process


def _weight_row(node):
    own = _weight(node)
    return [node.name, type(node.module).__name__, own.get_dtype(), getattr(own, "ch_axis", -1), _observer(own)]
