"""Target `onnx`: the quantized forward with QuantizeLinear and DequantizeLinear (QDQ), opset 21.

Opset 21 (IR 10) is the first whose QuantizeLinear and DequantizeLinear take int16. Weights and constants are int8 or
int16 initializers behind a DequantizeLinear, one scale for each output channel. Biases stay float32: a runtime that
wants int32 derives them from the two scales. fp16 operators round their result by a Cast to float16 and back. Results
that the qconfig leaves in high precision have no quantizer. Both quantizers round half to even and saturate; ONNX
divides by the scale where qflow multiplies by its reciprocal, so that a value within an ulp of a tie may differ by a
code.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qflow.api.prepared import Prepared
from qflow.core.version import VERSION
from qflow.export.contract import Exported, ExportError, Subject, applied_fallbacks, missing_extra, origin_text, written
from qflow.export.onnx_layout import flatten_products, place_quantizers
from qflow.export.program import Program, quantized_program, quiet
from qflow.export.quant_ops import CODES, DEQUANTIZE, FAKE_HALF, FAKE_QUANTIZE
from qflow.quant.values.half import HALF_MAX

OPSET = 21
_NAME = "qflow.name"


def export(subject: Subject, folder: Path) -> Exported:
    """Write `model.onnx`. Raises ExportError without the extra `export`, or if the model cannot be exported."""
    program, model = onnx_program(subject.prepared)
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    (folder / "README.md").write_text(_readme(subject, program))
    return Exported("onnx", written(folder), applied_fallbacks(subject.prepared), notes=program.notes)


def onnx_program(prepared: Prepared) -> tuple[Program, Any]:
    """The program of `prepared`, and it as an `onnx.ModelProto`; with a fixed batch size where ONNX has no free one."""
    program = quantized_program(prepared)
    try:
        return program, onnx_model(program)
    except ExportError:
        if not program.dynamic or "onnxscript" not in sys.modules:
            raise
        program = quantized_program(prepared, fixed="with a free one torch.onnx cannot translate the model")
        return program, onnx_model(program)


def onnx_model(program: Program) -> Any:
    """The program as an `onnx.ModelProto`."""
    try:
        import onnx_ir as ir
        import onnxscript  # noqa: F401  # torch.onnx imports it
    except ImportError as error:
        raise missing_extra("onnx", error) from error
    with quiet():  # torch copies a graph with a warning about its own classes
        program = replace(program, module=copy.deepcopy(program.module))
    flatten_products(program.module)
    try:
        with quiet():
            made = torch.onnx.export(
                program.exported(),
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                input_names=list(program.inputs),
                output_names=list(program.outputs),
                custom_translation_table=_translations(),
            )
    except Exception as error:  # torch.onnx raises many types
        raise _refused(error) from error
    assert made is not None
    _clean(made.model)
    place_quantizers(made.model)
    return ir.serde.serialize_model(made.model)


def _translations() -> dict[Any, Any]:
    """Quantizer -> a function that writes it in ONNX operators; the name is kept for `_clean`."""
    import onnx_ir as ir
    from onnxscript import opset18 as op

    def zeros(scale: Any, axis: int, bits: int) -> Any:
        count = [] if axis < 0 else [int(d) for d in scale.shape]
        return op.Constant(value=ir.tensor(torch.zeros(count, dtype=CODES[bits]).numpy()))

    def named(value: Any, name: str) -> Any:
        value.producer().metadata_props[_NAME] = name
        return value

    def fake_quantize(x: Any, scale: Any, axis: int, bits: int, name: str) -> Any:
        zero, along = zeros(scale, axis, bits), {"axis": axis} if axis >= 0 else {}
        codes = named(op.QuantizeLinear(x, scale, zero, **along), name)
        return named(op.DequantizeLinear(codes, scale, zero, **along), name)

    def fake_half(x: Any, clip: bool, name: str) -> Any:
        x = op.Clip(x, op.Constant(value_float=-HALF_MAX), op.Constant(value_float=HALF_MAX)) if clip else x
        half = named(op.Cast(x, to=ir.DataType.FLOAT16), name)
        return named(op.Cast(half, to=ir.DataType.FLOAT), name)

    def dequantize(codes: Any, scale: Any, axis: int, name: str) -> Any:
        along = {"axis": axis} if axis >= 0 else {}
        zero = zeros(scale, axis, 8 * codes.dtype.itemsize)
        return named(op.DequantizeLinear(codes, scale, zero, **along), name)

    return {FAKE_QUANTIZE: fake_quantize, FAKE_HALF: fake_half, DEQUANTIZE: dequantize}


def _clean(model: Any) -> None:
    """Call quantizers as the qconfig does, and remove what holds paths of this machine or depends on the run."""
    graph, taken = model.graph, set[str]()
    for node in graph:
        name = node.metadata_props.get(_NAME, "")
        if name:
            own = next(n for n in _numbered(name) if f"{n}/{node.op_type}" not in taken)
            node.name = f"{own}/{node.op_type}"
            taken.add(node.name)
            if not node.outputs[0].is_graph_output():
                node.outputs[0].name = node.name
            if node.inputs[0].is_initializer():
                _rename(graph, node.inputs[0], f"{own}/codes")
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in list(graph.initializers.values()):
        _rename(graph, value, value.name.removeprefix("prepared.model."))
    for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
        value.metadata_props.clear()
    model.metadata_props.clear()
    graph.metadata_props.clear()
    model.producer_name, model.producer_version, graph.name = "qflow", VERSION, "model"


def _numbered(name: str) -> Iterator[str]:
    """The name, and that of each further call: `head`, `head(1)`, ..."""
    yield name
    yield from (f"{name}({n})" for n in itertools.count(1))


def _rename(graph: Any, value: Any, name: str) -> None:
    if name not in graph.initializers:
        graph.initializers.pop(value.name)
        value.name = name
        graph.register_initializer(value)


def _refused(error: BaseException) -> ExportError:
    while error.__cause__ is not None:  # the innermost names the operator
        error = error.__cause__
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
    return ExportError(
        f"An ONNX export takes operators that torch.onnx translates, but got: {text.rstrip('.')}. Replace this "
        "operator in the model, or export to the target torch."
    )


def _readme(subject: Subject, program: Program) -> str:
    return f"""# Quantized model for ONNX runtimes

{origin_text(subject)}

`model.onnx` is a QDQ model, opset {OPSET}, IR 10. Its inputs are {", ".join(program.inputs)},
its outputs {", ".join(program.outputs)}.

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdqisint8allowed", "1")     # x86: keep int8, do not convert to uint8
    session = onnxruntime.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {{name: array}})

Each operator gives the codes of the prepared model, or one beside them. Quantizers are called
`<operator>/QuantizeLinear` with the operator's name in the qconfig; those with `/moved` and `/before_relu` change no
value and are there so that runtimes find integer kernels.
"""
