"""onnxruntime as a second opinion on the engine: codes of each operator, ours beside those of the exported model.

Each quantizer of the QDQ model gives its codes as a further output. In the `forced` model the operators behind it read
our codes instead, from a further input, so that each operator is compared from equal inputs; in the `chained` model
they read those of onnxruntime, and differences add up.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.fx import Interpreter
from torch.utils._pytree import tree_leaves

from qflow.export.onnx import onnx_program
from qflow.export.quant_ops import FAKE_HALF, FAKE_QUANTIZE
from qflow.quant.trace.calling import named_tensors, run_model, state_tensors
from qflow.quant.trace.state import Frame, copied_state

RUNTIMES = {
    "plain": ("ORT_DISABLE_ALL", {}),
    "fused": ("ORT_ENABLE_ALL", {}),
    "integer": ("ORT_ENABLE_ALL", {"session.qdqisint8allowed": "1"}),
}
"""Without optimizations; with them (codes become uint8 on x86); with them, and codes stay int8."""
INTEGER_KERNELS = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantize", "QAttention")


@dataclass
class Differences:
    """Codes of one operator kind, or of one operator."""

    count: int = 0
    one: int = 0
    more: int = 0
    largest: int = 0
    off_tie: float = 0.0
    """Of values whose codes differ, how far our value is at most from the border between the two codes, in steps."""

    def add(self, ours: np.ndarray, theirs: np.ndarray, steps: np.ndarray) -> None:
        """Compare codes; `steps` is the value before rounding, in steps."""
        apart = np.abs(ours.astype(np.int64) - theirs.astype(np.int64))
        self.count += apart.size
        self.one += int((apart == 1).sum())
        self.more += int((apart > 1).sum())
        self.largest = max(self.largest, int(apart.max(initial=0)))
        if (apart > 0).any():
            border = ours + 0.5 * np.sign(theirs.astype(np.int64) - ours)
            self.off_tie = max(self.off_tie, float(np.abs(steps - border)[apart > 0].max()))

    def join(self, other: Differences) -> None:
        self.count, self.one, self.more = self.count + other.count, self.one + other.one, self.more + other.more
        self.largest, self.off_tie = max(self.largest, other.largest), max(self.off_tie, other.off_tie)

    @property
    def equal(self) -> float:
        return 1.0 - (self.one + self.more) / self.count if self.count else 1.0


@dataclass
class Comparison:
    """One network in one runtime."""

    forced: dict[str, Differences]
    """Operator call -> its codes, computed from equal inputs."""
    chained: dict[str, Differences]
    outputs: dict[str, float]
    """Largest difference of each output, relative to its largest value."""
    kernels: Counter[str] = field(default_factory=Counter)

    @property
    def integer_kernels(self) -> int:
        return sum(n for name, n in self.kernels.items() if name.startswith(INTEGER_KERNELS))


class Recorder(Interpreter):
    """Runs our graph and keeps codes and values of each quantizer: name and number of the call -> both."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
        self.calls: Counter[str] = Counter()

    def call_function(self, target, args, kwargs):
        out = super().call_function(target, args, kwargs)
        if target in (FAKE_QUANTIZE, FAKE_HALF):
            name = args[-1]
            key, self.calls[name] = (name, self.calls[name]), self.calls[name] + 1
            if target is FAKE_HALF:
                half = out.to(torch.float16).numpy()
                self.found[key] = half, _ordered(half).astype(np.float64)
            else:
                x, scale, axis, bits, _ = args
                shape = [-1 if i == axis else 1 for i in range(x.ndim)] if axis >= 0 else []
                scale = scale.view(shape)
                codes = torch.round(out / scale).to({8: torch.int8, 16: torch.int16}[bits])
                self.found[key] = codes.numpy(), (x.double() / scale.double()).numpy()
        return out


def compare(prepared, sample) -> dict[str, Comparison]:
    """Runtime -> how the codes of `prepared` on `sample` compare with those of the exported model.

    Also asserts that our own program gives the outputs of `prepared`, bit for bit. A model with state, or with a fixed
    batch size, runs on its own sample.
    """
    program, model = onnx_program(prepared)
    whole = program.dynamic and "state" not in program.kwargs
    inputs = tree_leaves(sample) if whole else tree_leaves((program.args, dict(program.kwargs)))
    inputs = [t for t in inputs if isinstance(t, torch.Tensor)]
    recorder = Recorder(program.module)
    with torch.no_grad():
        expected = expected_outputs(prepared, sample if whole else prepared.sample, program.kwargs.get("state"))
        got = [t for t in tree_leaves(recorder.run(*inputs)) if isinstance(t, torch.Tensor)]
    assert len(got) == len(expected) == len(program.outputs)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)), "the program is not the model"
    feed = {n: t.numpy() for n, t in zip(program.inputs, inputs, strict=True)}
    ours = {n: t.numpy() for n, t in zip(program.outputs, expected, strict=True)}
    found = {}
    for runtime in RUNTIMES:
        outputs, kernels = run(model, feed, runtime)
        chained, _ = run(opened(model, recorder.found, False), feed, runtime)
        forced, _ = run(opened(model, recorder.found, True), feed, runtime, recorder.found)
        found[runtime] = Comparison(
            _differences(recorder.found, forced), _differences(recorder.found, chained),
            {name: _distance(value, outputs[name]) for name, value in ours.items()}, kernels,
        )  # fmt: skip
    return found


def expected_outputs(prepared, inputs, state=None) -> list[torch.Tensor]:
    """The output tensors of a prepared model, and those of its state if it has one."""
    if state is None:
        return [t for _, t in named_tensors(run_model(prepared, inputs))]
    found = run_model(prepared, Frame(inputs, copied_state(state)))
    return [t for _, t in [*named_tensors(found.outputs), *state_tensors(found.after)]]


def by_kind(prepared, operators: dict[str, Differences]) -> dict[str, Differences]:
    """The sums over the kinds of operators; inner values of norms and softmaxes, and requantized inputs, apart."""
    kinds = {node.quantizer: str(node.kind.value) for node in prepared.graph.quantized}
    kinds |= {name: "inner value" for node in prepared.graph.quantized for name in node.inner}
    found: dict[str, Differences] = defaultdict(Differences)
    for name, differences in operators.items():
        found["weight" if name.endswith(".weight") else kinds.get(name, "requantized input")].join(differences)
    return dict(sorted(found.items()))


def _names(key: tuple[str, int]) -> list[str]:
    name, n = key
    full = f"{name}({n})" if n else name
    return [f"{full}/QuantizeLinear", f"{full}/Cast"]


def opened(model, found, forced: bool):
    """A copy in which the codes of the quantizers in `found` are outputs; if `forced`, read from inputs."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    nodes = {node.name: node for node in graph.node}
    for key, (codes, _) in found.items():
        node = next((nodes[name] for name in _names(key) if name in nodes), None)
        if node is None:  # two equal quantizers of one value became one
            twins = [other for other, (held, _) in found.items() if other != key and np.array_equal(held, codes)]
            assert twins, f"no quantizer of {key}"
            continue
        kind = onnx.helper.np_dtype_to_tensor_dtype(codes.dtype)
        output = node.output[0]
        graph.output.append(onnx.helper.make_tensor_value_info(output, kind, codes.shape))
        if forced:
            graph.input.append(onnx.helper.make_tensor_value_info(f"{output}/forced", kind, codes.shape))
            for reader in graph.node:
                for i, name in enumerate(reader.input):
                    if name == output:
                        reader.input[i] = f"{output}/forced"
    return copy


def run(model, feed, runtime, forced=None):
    """(outputs by name, kernels by type)."""
    import tempfile
    from pathlib import Path

    import onnx
    import onnxruntime as ort

    level, entries = RUNTIMES[runtime]
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        kernels = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    wanted = {i.name for i in session.get_inputs()}
    given = {**feed, **{f"{n}/forced": codes for key, (codes, _) in (forced or {}).items() for n in _names(key)}}
    names = [o.name for o in session.get_outputs()]
    values = session.run(names, {n: v for n, v in given.items() if n in wanted})
    return dict(zip(names, values, strict=True)), kernels


def _differences(ours, theirs) -> dict[str, Differences]:
    found: dict[str, Differences] = defaultdict(Differences)
    for key, (codes, steps) in ours.items():
        got = next((theirs[name] for name in _names(key) if name in theirs), None)
        if got is None:
            continue
        if codes.dtype == np.float16:
            codes, got = _ordered(codes), _ordered(got)
        found[key[0]].add(codes, got, steps)
    return dict(found)


def _ordered(half: np.ndarray) -> np.ndarray:
    """Halves as integers in their order, so that neighbours differ by 1; -0 is 0."""
    bits = half.view(np.int16).astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


def _distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.dtype.kind != "f":
        return float(np.abs(ours.astype(np.float64) - theirs).max(initial=0.0))
    finite = np.isfinite(ours)
    scale = max(float(np.abs(ours[finite]).max(initial=0.0)), 1e-12)
    return float(np.abs(ours[finite] - theirs[finite]).max(initial=0.0)) / scale
