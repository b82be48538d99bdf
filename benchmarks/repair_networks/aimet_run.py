"""AIMET on one network of the benchmark; run with a Python that has AIMET, it prints drops as one JSON object.

    python -m benchmarks.repair_networks.aimet_run NETWORK BITS CALIBRATION EVALUATION WEIGHTS [WHEELS]

Its scheme is made as near to that of the device as it allows: symmetric int8 activations, one signed scale a tensor,
weights per output channel, batch norms folded, activations quantized at the outputs of operators. It differs in what is
quantized (its own fusions; results of operators that it does not know stay float), in the range of activations (least
squared error of a histogram) and in the range of weights (symmetric by their own error).
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.repair_networks.cases import CASES, Places, Size
from qflow.tasks.task import Task, batches, evaluate, model_inputs

SCHEME = {
    "defaults": {
        "ops": {"is_output_quantized": "True", "is_symmetric": "True"},
        "params": {"is_quantized": "True", "is_symmetric": "True"},
        "strict_symmetric": "False",
        "unsigned_symmetric": "False",
        "per_channel_quantization": "True",
    },
    "params": {"bias": {"is_quantized": "False"}},
    "op_type": {},
    "supergroups": [
        {"op_list": ["Conv", "Relu"]},
        {"op_list": ["ConvTranspose", "Relu"]},
        {"op_list": ["Conv", "Clip"]},
        {"op_list": ["Gemm", "Relu"]},
        {"op_list": ["Add", "Relu"]},
    ],
    "model_input": {"is_input_quantized": "True"},
    "model_output": {},
}


def declare_torchvision() -> None:
    """AIMET imports torchvision; a build for CUDA lacks these operators beside a CPU build of torch."""
    try:
        import torchvision  # type: ignore[import-untyped]  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        declare_torchvision.library = torch.library.Library("torchvision", "DEF")  # type: ignore[attr-defined]
        for name in ("nms", "qnms"):
            declare_torchvision.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class Aimet:
    """The steps of AIMET on a task; each returns the drop with all operators at int8."""

    def __init__(self, task: Task, bits: int) -> None:
        from aimet_torch.model_preparer import prepare_model

        self.task, self.bits = task, bits
        self.data = [model_inputs(task, batch)[0] for batch, _ in batches(task, "calibration", 32)]
        self.model = prepare_model(copy.deepcopy(task.model)).eval()
        self.float_metric, _ = evaluate(task, task.model, 64)

    def drop(self, model: nn.Module, frozen: Callable[[Any], None] = lambda sim: None) -> float:
        """Quantize `model`, with the encodings that `frozen` sets before."""
        from aimet_torch.quantsim import QuantizationSimModel

        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(SCHEME, file)
            file.flush()
            sim = QuantizationSimModel(
                model,
                self.data[0],
                quant_scheme="tf_enhanced",
                default_output_bw=8,
                default_param_bw=self.bits,
                config_file=file.name,
            )
        frozen(sim)
        sim.compute_encodings(lambda m: [m(x) for x in self.data] and None)
        return self.task.drop(self.float_metric, evaluate(self.task, sim.model, 64)[0])

    def plain(self) -> float:
        """Batch norms folded, nearest codes."""
        return self.drop(self._folded())

    def _folded(self) -> nn.Module:
        from aimet_torch.batch_norm_fold import fold_all_batch_norms

        model = copy.deepcopy(self.model)
        fold_all_batch_norms(model, tuple(self.data[0].shape), self.data[0])
        return model

    def equalized(self) -> float:
        """Cross-layer equalization, high biases absorbed."""
        from aimet_torch.cross_layer_equalization import equalize_model

        model = copy.deepcopy(self.model)
        equalize_model(model, tuple(self.data[0].shape), self.data[0])
        return self.drop(model)

    def rounded(self) -> float:
        """The rounding of weights trained layer by layer, 500 iterations a layer (its default is 10,000)."""
        from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters

        parameters = AdaroundParameters(self.data, len(self.data), 500, forward_fn=lambda m, x: m(x))
        with tempfile.TemporaryDirectory() as folder:
            model = Adaround.apply_adaround(
                self._folded(), self.data[0], parameters, folder, "rounded", default_param_bw=self.bits,
                default_config_file=self._scheme(Path(folder)),
            )  # fmt: skip
            encodings = f"{folder}/rounded.encodings"
            return self.drop(model, lambda sim: sim.set_and_freeze_param_encodings(encodings))

    @staticmethod
    def _scheme(folder: Path) -> str:
        path = folder / "scheme.json"
        path.write_text(json.dumps(SCHEME))
        return str(path)


def main(name: str, bits: str, calibration: str, evaluation: str, weights: str, wheels: str = "") -> None:
    """Print the drops by step, after each of them; a step that fails is told on stderr and left out."""
    torch.set_num_threads(1)
    declare_torchvision()
    size = Size(int(calibration), int(evaluation))
    task = CASES[name].build(size, Places(Path(weights), Path(wheels) if wheels else None))
    aimet, found = Aimet(task, int(bits)), {}
    for label, step in (("int8", aimet.plain), ("CLE", aimet.equalized), ("AdaRound", aimet.rounded)):
        try:
            found[f"AIMET {label}"] = step()
            print(json.dumps(found), flush=True)  # the last line counts
        except Exception as error:  # the tool's own, of any kind
            print(f"{label}: {type(error).__name__}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
