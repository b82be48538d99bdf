"""`qflow.load`: the model of a stored trial, calibrated with the scales that were judged. No data is needed.

    prepared = qflow.load("models:/perception@champion")
    outputs = prepared(images)          # those of the trial, bit for bit

The files of the trial are verified before anything is built from them. Its code is not among them: the float model
comes from the caller, from a built-in task, or from a package that the caller allows (bundle/targets.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qflow.api.prepared import Prepared
from qflow.api.qat_mode import get_qat_mode
from qflow.bundle.example import read_example
from qflow.bundle.files import EXAMPLE
from qflow.bundle.source import fetch
from qflow.bundle.stored import StoredTrial, config_of
from qflow.bundle.targets import BUILT_IN, check_targets, way_out
from qflow.config.build import build_model
from qflow.config.device_file import name_of
from qflow.config.settings import plain, trial_settings
from qflow.core.errors import BundleError, ConfigError, ModelError
from qflow.core.record import digest
from qflow.quant.model import prepare as engine
from qflow.quant.model.model_state import restore_stored
from qflow.quant.model.shared_modules import split_names
from qflow.quant.trace.calling import batch_size, cut
from qflow.tasks.identity import weights_digest

Model = nn.Module | Callable[[], nn.Module]


def load(
    source: str | Path,
    *,
    model: Model | None = None,
    allow: Iterable[str] = (),
    uri: str | None = None,
    device: str = "cpu",
) -> Prepared:
    """Return the prepared and calibrated model of a trial; it computes what the trial computed, bit for bit.

    `source` is `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/ID`, a run id, a folder or a .zip. `uri` is the
    MLflow store (by default the one in QFLOW_HOME or ./qflow_out). `model` is the float model, or a function that
    returns it; else the run's own `_target_` is used if it is of a built-in task or in a package of `allow`. `device`
    is `cpu` or a GPU; the bits are the trial's on the kind of device and the batch size that it ran with. Raises
    BundleError if files are not as they were written or the model's code is not allowed, ModelError if the model is
    another one, TrackingError if the store lacks the source.
    """
    return prepared_of(fetch(source, uri=uri), model=model, allow=allow, device=device)


def prepared_of(
    trial: StoredTrial,
    *,
    model: Model | None = None,
    allow: Iterable[str] = (),
    own: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> Prepared:
    """Return the prepared and calibrated model of a stored trial; arguments and errors are those of `load`.

    `own` is a configuration that the caller composed: code that it names may run too.
    """
    if not (trial.folder / EXAMPLE[0]).is_file():
        raise BundleError(
            f"A trial is loaded with the input example of its study, but got none with {trial.source}. Give the model "
            "inputs of tensors, lists and dicts, and run the study again."
        )
    place = _device(device)
    found = float_model(trial, model, allow, own).to(place)
    example = tree_map(lambda v: v.to(place) if isinstance(v, Tensor) else v, read_example(trial.folder))
    quant = plain(trial.config.quant)
    prepared = engine.prepare(
        found,
        example,
        tuple(quant["skip"]),
        quant["fold_functional_norms"],
        tuple(trial.config.task.cached_attrs),
        tuple(map(str, split_names(quant["split_shared"]))),
    )
    prepared.__class__ = Prepared
    assert isinstance(prepared, Prepared)
    if digest(prepared.graph) != trial.manifest.get("graph"):
        raise ModelError(
            f"A loaded model has the operators of its trial, but got others than {trial.source} has. Take the code "
            "that the study ran with."
        )
    prepared.sample = cut(example, batch_size(example), 0, 1)
    prepared.requested, prepared.applied = trial.requested, trial.qconfig
    prepared.march, prepared.qat_mode = name_of(trial.config.device), get_qat_mode()
    prepared.settings = trial_settings(trial.config).calibration
    prepared.sensitivities = trial.sensitivities
    prepared.scores = trial.sensitivities.activation_scores() if trial.sensitivities else {}
    prepared.configure(trial.qconfig)
    restore_stored(prepared, trial.quantizers, trial.scales)
    prepared.know_weights()
    prepared._calibrated = True
    return prepared


def float_model(
    trial: StoredTrial, model: Model | None, allow: Iterable[str] = (), own: Mapping[str, Any] | None = None
) -> nn.Module:
    """Return the float model in eval mode with the weights of the trial, a copy of what the caller gave."""
    found = _given(model) if model is not None else _own(trial, tuple(allow), own)
    found = copy.deepcopy(found).cpu().eval()
    if trial.weights is not None:
        _load_weights(found, trial)
    elif (now := weights_digest(found)) != trial.manifest.get("weights"):
        raise ModelError(
            f"A loaded model has the weights of its trial, but got {now} instead of {trial.manifest.get('weights')}. "
            "Give the trained model: model=..."
        )
    return found


def _given(model: Model) -> nn.Module:
    found = model if isinstance(model, nn.Module) else model()
    if not isinstance(found, nn.Module):
        raise ConfigError(f"model is an nn.Module, or a function that returns one, but got {type(found).__name__}.")
    return found


def _own(trial: StoredTrial, allow: tuple[str, ...], own: Mapping[str, Any] | None) -> nn.Module:
    """Return the model that the trial names, if its code is built in or allowed."""
    node = config_of(trial)["task"]
    named = {"_target_": node["_target_"]} if node["_target_"] else {"model": node["model"]}
    try:
        check_targets({"task": named}, allow, own)
    except BundleError as error:
        name = node["_target_"] or node["model"].get("_target_")
        if name in BUILT_IN:  # its arguments are refused
            raise
        raise BundleError(
            f"A model's code is not stored with {trial.source}, which names {name!s:.80}. In Python, give it as "
            f"model=... {way_out(str(name))}"
        ) from error
    found = build_model(trial.config)
    if not isinstance(found, nn.Module):
        raise ConfigError(f"task.model gives a torch.nn.Module, but got {type(found).__name__}. Give model=...")
    return found


def _load_weights(model: nn.Module, trial: StoredTrial) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    assert trial.weights is not None
    try:
        model.load_state_dict(load_file(trial.weights))
    except (RuntimeError, SafetensorError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise ModelError(
            f"The weights of {trial.source} belong to its model, but got: {text}. Give the model of the study: "
            "model=..."
        ) from error


def _device(device: str) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError:
        place = None  # type: ignore[assignment]
    if place is None or (place.type != "cpu" and not (place.type == "cuda" and torch.cuda.is_available())):
        raise ConfigError(f"device is cpu or a GPU that torch sees, but got {device}. Use device='cpu'.")
    return place
