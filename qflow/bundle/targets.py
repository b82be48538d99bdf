"""Which code a stored configuration may name: built-in tasks, torch's optimizers, and what the caller allows.

A run, archive or model version is data. Its `_target_`s are compared with names that the caller has given; a package
that the caller allows (`security.allow`, `allow=`, QFLOW_ALLOW) may be imported, and what is found must be defined in
such a package, so that `my.os.system` is refused.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qflow.config.build import find_object
from qflow.core.errors import BundleError

BUILT_IN = frozenset(
    f"qflow.tasks.{name}"
    for name in (
        "digits.build_model",
        "digits.build_data",
        "digits.Accuracy",
        "digits.loss",
        "dual.build_model",
        "exposure.build_model",
        "exposure.build_data",
        "perception.model.build_model",
        "perception.data.build_data",
        "perception.metric.Found",
        "perception.metric.loss",
        "temporal.build_model",
        "temporal.build_data",
        "temporal.Hit",
        "onnx_model.load",
    )
)
NOT_THE_USERS = ("qflow", "torch", "numpy", "hydra", "omegaconf", "mlflow", "optuna")
_TORCH = re.compile(r"torch\.(optim|optim\.lr_scheduler|nn)\.[A-Za-z]\w*")


def targets(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, name) of every `_target_` in plain containers, however deep."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, Mapping):
        items = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    for key, value in items:
        place = f"{where}.{key}" if where else str(key)
        if key == "_target_":
            if value not in (None, ""):
                yield place, value
        else:
            yield from targets(value, place)


def check_targets(config: Mapping[str, Any], allow: Iterable[str] = (), own: Mapping[str, Any] | None = None) -> None:
    """Raise BundleError for a `_target_` in `config` that is neither built in nor allowed nor one of `own`.

    `allow` are packages (`my`) or modules (`my.models`); `own` is a configuration that the caller composed itself.
    """
    packages = tuple(allow)
    stated = {name for _, name in targets(own or {})}
    for place, name in targets(config):
        if not isinstance(name, str):
            raise BundleError(f"{place} is the name of a class or function, but got {name!r:.60}. Take another source.")
        if name in BUILT_IN or name in stated or _of_torch(name):
            continue
        home = _home(name) if _within(name, packages) else name
        if not _within(home, packages):
            defined = f", which is defined in {home:.80}" if home != name else ""
            raise BundleError(
                f"Code that a run names is run only if it is built in or allowed, but got {name:.80} for {place}"
                f"{defined}. {way_out(home)}"
            )


def own_packages(config: Mapping[str, Any]) -> list[str]:
    """Return the packages of the `_target_`s in `config` that must be allowed before they are run from a run."""
    names = {str(name) for _, name in targets(config)}
    return sorted({name.partition(".")[0] for name in names if name not in BUILT_IN and not _of_torch(name)})


def way_out(name: str) -> str:
    """Return how the package of a name is allowed, in the words of each interface, if it may be the user's."""
    package = name.partition(".")[0]
    if package in sys.stdlib_module_names or package in NOT_THE_USERS or not package.isidentifier():
        return "Take another source."
    named = f"security.allow=[{package}] (allow=['{package}'] in qflow.load, QFLOW_ALLOW={package} for MLflow)"
    return f"If it is yours, allow its package: {named}."


def _of_torch(name: str) -> bool:
    """True for an optimizer, a scheduler or a loss class of torch, by its public name."""
    if not _TORCH.fullmatch(name):
        return False
    import torch
    from torch.nn.modules.loss import _Loss

    place, _, own = name.rpartition(".")
    kinds = {
        "torch.optim": (torch.optim, torch.optim.Optimizer),
        "torch.optim.lr_scheduler": (torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler),
        "torch.nn": (torch.nn, _Loss),
    }
    module, base = kinds[place]
    found = getattr(module, own, None)
    return isinstance(found, type) and issubclass(found, base)


def _home(name: str) -> str:
    """The module in which the object of this name, in an allowed package, is defined."""
    return str(getattr(find_object(name, "security.allow"), "__module__", None) or "an unknown place")


def _within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)
