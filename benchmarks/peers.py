"""Time that another tool takes to rank layers by sensitivity: `pip install nvidia-modelopt huggingface_hub`.

ModelOpt's gradient method (`auto_quantize`) runs one forward and one backward pass per batch and gives a score for each
layer with weights, weight and input together. It calibrates first; that time is measured separately and subtracted. The
time to replace modules and to solve for a budget of bits is included; it matters most where a forward pass takes only
milliseconds.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import time
import warnings
from typing import Any

from torch import Tensor, nn

BATCH = 16


def installed() -> bool:
    """True if ModelOpt can be imported."""
    return importlib.util.find_spec("modelopt") is not None


def modelopt_ranking(model: nn.Module, samples: Tensor) -> tuple[float, int]:
    """(CPU seconds for the scores alone, number of layers with a score)."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq

        batches = list(samples.split(BATCH))

        def calibrate(prepared: nn.Module) -> None:
            for batch in batches:
                prepared(batch)

        def all_of_it() -> Any:
            return mtq.auto_quantize(
                copy.deepcopy(model),
                constraints={"effective_bits": 12.0},
                quantization_formats=[mtq.INT8_DEFAULT_CFG],
                data_loader=batches,
                forward_step=lambda prepared, batch: prepared(batch),
                loss_func=lambda output, batch: output.square().mean(),
                num_calib_steps=len(batches),
                num_score_steps=len(batches),
            )[1]

        before, _ = _seconds(lambda: mtq.quantize(copy.deepcopy(model), mtq.INT8_DEFAULT_CFG, calibrate))
        taken, state = _seconds(all_of_it)
    return taken - before, len(state["candidate_stats"])


def _seconds(call: Any) -> tuple[float, Any]:
    start = time.process_time()
    found = call()
    return time.process_time() - start, found
