"""The fingerprint of a study: all that its results depend on. A study continues only if it is unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from qflow.config.settings import plain
from qflow.core.errors import TrackingError
from qflow.core.record import digest, to_json

# Keys that may change between two starts of one study; all others must stay the same.
FREE = (
    *("root", "tracking.", "task.batch_size", "task.data.workers"),
    *("executor.kind", "executor.threads", "executor.workers", "executor.max_retries", "executor.trial_timeout"),
    *("executor.gpus", "executor.address"),
    *("search.n_trials", "search.timeout", "search.max_evaluations", "search.enqueue", "search.strategy"),
    "search.storage",
    *("search.rates", "search.probe_share", "search.weight_decays"),  # these choose points, but not results
)
SINCE = (
    "engine",
    "search.when",
    "quant.fold_functional_norms",
    "quant.split_shared",
    "objective.optimize",
    "objective.max_slowdown",
    "qconfig.float16_count",
    "qconfig.assignment",
    "qconfig.error_share",
    "task.cached_attrs",
    *("metric._target_", "metric.by", "metric.outputs"),
    *("qat.learned_scales", "qat.ema", "qat.dampening", "qat.cosine_decay"),
    *("qat.teacher.weight", "qat.teacher.features", "qat.teacher.temperature"),
)  # left out at their defaults, so that studies from before these keys existed continue
UNSET: tuple[Any, ...] = (None, "", False, 0, {}, [], "report", "qflow")
START = "search.start"
LEGIBLE = 40  # characters up to which the fingerprint holds a setting as text; a longer one as its digest


def fingerprint(config: DictConfig, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return what results depend on, by dotted key: configuration, weights, data, graph and versions."""
    return {
        **settings_state(config),
        **({START: manifest["start"]} if "start" in manifest else {}),  # the content of its files, wherever they lie
        **{key: str(manifest[key]) for key in ("weights", "data", "graph", "profile", "eval_samples", "qflow")},
        "float_metric": f"{manifest['float_metric']:.6g}",
        "torch": manifest["versions"]["torch"],
        **({"engine.version": manifest["engine"]} if "engine" in manifest else {}),
    }


def settings_state(config: DictConfig) -> dict[str, str]:
    """Return the part of the fingerprint that the configuration alone gives, before the model is built."""
    state = {
        key: text if len(text := to_json(value)) <= LEGIBLE else digest(value)
        for key, value in flat(plain(config))
        if not key.startswith(FREE) and not (key in SINCE and value in UNSET) and key != START
    }
    named = config.objective.optimize
    return {
        **state,
        **({"objective.optimize": ", ".join(named)} if named else {}),  # their order is the order of the stored values
    }


def flat(node: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of a nested mapping by dotted key."""
    found: list[tuple[str, Any]] = []
    for key, value in node.items():
        found += flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [(f"{prefix}{key}", value)]
    return found


def known_state(text: str) -> dict[str, str]:
    """Return the state that `Session.open` stored, as data of a store. Raises TrackingError for another text."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise TrackingError(
            f"The tag qflow.fingerprint of a study is as qflow wrote it, but got {text!r:.60}. Use another name: "
            "study=<name>."
        )
    return found


def changes(before: str, now: Mapping[str, str]) -> list[str]:
    """Return `key: old -> new` for each difference from the text that `Session.open` stored."""
    known = known_state(before)
    return [
        f"{key}: {known.get(key, 'nothing')} -> {now.get(key, 'nothing')}"
        for key in sorted({*known, *now})
        if known.get(key) != now.get(key) and not key.startswith(FREE)
    ]
