"""The plugin's `check_qat_model` (reference, section 1.3)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qflow.analysis.checks.model_check import check_text
from qflow.analysis.measures.tables import ModelCheck
from qflow.api.arguments import folder_at
from qflow.api.library import check
from qflow.api.prepared import Prepared
from qflow.api.qat_mode import with_keywords
from qflow.core.errors import ConfigError
from qflow.quant.trace.binding import example_of
from qflow.quant.trace.calling import call_model


def check_qat_model(
    model: Prepared,
    example_inputs: Any = None,
    example_kw_inputs: Mapping[str, Any] | None = None,
    save_results: bool = False,
    out_dir: str | Path | None = None,
) -> ModelCheck:
    """Return `check(model)`, as the plugin's function of this name; with `save_results` write its text file.

    With inputs, the float model runs on them first, so that operators that the trace did not reach are found. The file
    is model_check_result.txt in `out_dir`, by default the working folder. Raises ConfigError or ModelError.
    """
    if not isinstance(model, Prepared):
        raise ConfigError(f"A model is checked after qflow.prepare, but got {type(model).__name__}. Prepare it first.")
    if example_inputs is not None or example_kw_inputs:
        if model.training:
            raise ConfigError("A model is checked in eval mode, but got one that trains. Set VALIDATION first.")
        inputs = example_of(model.model, with_keywords(model.model, example_inputs, example_kw_inputs))
        with torch.no_grad(), model.collecting():  # runs in float; what it collects is dropped
            call_model(model.observed, inputs)  # type: ignore[arg-type]
        if model.cached is not None:
            model.reset_state()
    found = check(model)
    if save_results:
        (folder_at(out_dir or ".") / "model_check_result.txt").write_text(check_text(found), encoding="utf-8")
    return found
