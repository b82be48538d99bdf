"""Which code a stored configuration may name: built-in tasks, torch's optimizers, and what the caller allows.

A run, archive or model version is data. Its `_target_`s are compared with names that the caller has given; a package
that the caller allows (`security.allow`, `allow=`, QFLOW_ALLOW) may be imported, and what is found must be defined in
such a package, so that `my.os.system` is refused.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from qflow.config.build import find_object, texts
from qflow.core.errors import BundleError

PARTS = ("build_model", "build_data")
BUILT_IN = frozenset(
    f"qflow.tasks.{name}"
    for name in (
        "digits.build_model",
        "digits.build_data",
        "digits.Accuracy",
        "digits.loss",
        "detection.adapters.UltralyticsBoxes",
        "detection.adapters.UltralyticsMaps",
        "detection.data.CocoData",
        "detection.metric.MeanAP",
        "detection.torchvision.Boxes",
        "detection.torchvision.Network",
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
        "metrics.agreement.Agreement",
        *(f"images.{name}_models.{part}" for name in ("timm", "torchvision", "transformers") for part in PARTS),
        "images.own_models.build_data",
        "images.onnx_data.build_data",
        "metrics.labels.Top1",
        "metrics.labels.MeanIoU",
    )
)
NOT_THE_USERS = ("qflow", "torch", "numpy", "hydra", "omegaconf", "mlflow", "optuna")
_PREFIX = re.compile(r"^[^/\\:]*:|::|:/")
_TORCH = re.compile(r"torch\.(optim|optim\.lr_scheduler|nn)\.[A-Za-z]\w*")


def calls(node: Any, where: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield (key, name, arguments) of every `_target_` in plain containers, however deep."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, Mapping):
        items = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    for key, value in items:
        place = f"{where}.{key}" if where else str(key)
        if key != "_target_":
            yield from calls(value, place)
        elif value not in (None, ""):
            yield place, value, {name: argument for name, argument in node.items() if name != key}


def check_targets(config: Mapping[str, Any], allow: Iterable[str] = (), own: Mapping[str, Any] | None = None) -> None:
    """Raise BundleError for a `_target_` in `config` that is neither built in nor allowed nor one of `own`.

    `allow` are packages (`my`), modules (`my.models`), or whole names; `own` is a configuration that the caller
    composed itself. A built-in function gets no path outside of the working folder that `own` does not state.
    """
    packages = tuple(allow)
    stated = {name: [*texts(arguments)] for _, name, arguments in calls(own or {}) if isinstance(name, str)}
    imported = []
    for place, name, arguments in calls(config):
        if not isinstance(name, str):
            raise BundleError(f"{place} is the name of a class or function, but got {name!r:.60}. Take another source.")
        if name in packages:
            continue
        if name in BUILT_IN:
            _check_paths(name, set(_outside(arguments)) - set(stated.get(name, ())), packages)
        elif name not in stated and not _of_torch(name):
            if not _within(name, packages):
                raise _refused(name, place, name)
            imported.append((name, place))
    for name, place in imported:  # once all names are known to be the caller's
        if not _within(home := _home(name), packages):
            raise _refused(name, place, home)


def own_packages(config: Mapping[str, Any]) -> list[str]:
    """Return what of the `_target_`s in `config` must be allowed before it is run from a run.

    That is the user's package; a function of a library, or a built-in one with a path of the user's, is named in full.
    """
    found = set()
    for _, name, arguments in calls(config):
        if name in BUILT_IN:
            found |= {name} if any(_outside(arguments)) else set()
        elif not _of_torch(str(name)):
            found.add(str(name) if _of_library(str(name)) else str(name).partition(".")[0])
    return sorted(found)


def _refused(name: str, place: str, home: str) -> BundleError:
    defined = f", which is defined in {home:.80}" if home != name else ""
    return BundleError(
        f"Code that a run names is run only if it is built in or allowed, but got {name:.80} for {place}{defined}. "
        f"{way_out(home)}"
    )


def _check_paths(name: str, paths: Iterable[str], packages: tuple[str, ...]) -> None:
    if not _within(name, packages) and (odd := sorted(paths)):
        raise BundleError(
            f"A run names files in the working folder alone, but got {odd[0]!r:.80} for {name}. If it is yours, allow "
            f"it: {_ways(name)}."
        )


def _outside(arguments: Mapping[str, Any]) -> Iterator[str]:
    """The texts in the arguments that some library reads as a place outside of the working folder.

    These are absolute paths, those of a parent or home folder, and all with a prefix before a colon: a drive, an
    address, or the source of a hub (`hf-hub:`, `local-dir:`). Libraries leave out blanks and control characters.
    """
    for text in texts(arguments):
        plain = "".join(c for c in text if c.isprintable() and not c.isspace())
        paths = (PurePosixPath(plain), PureWindowsPath(plain))
        if _PREFIX.search(plain) or plain.startswith("~") or any(p.anchor or ".." in p.parts for p in paths):
            yield text


def way_out(name: str) -> str:
    """Return how the package of a name is allowed, in the words of each interface, if it may be the user's."""
    package = name.partition(".")[0]
    if _of_library(name) or not package.isidentifier():
        return "Take another source."
    return f"If it is yours, allow its package: {_ways(package)}."


def _ways(name: str) -> str:
    return f"security.allow=[{name}] (allow=['{name}'] in qflow.load, QFLOW_ALLOW={name} for MLflow)"


def _of_library(name: str) -> bool:
    package = name.partition(".")[0]
    return package in sys.stdlib_module_names or package in NOT_THE_USERS


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
