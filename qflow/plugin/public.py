"""The public names of horizon_plugin_pytorch. Nothing else of it is used, and every call is logged.

The modules that are searched for a name are fixed here: no run or configuration names code of the plugin.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from qflow.core.engine import require_plugin
from qflow.core.errors import ConfigError, QflowError, TrialError
from qflow.trial.record import EngineCall

SHORT = 60  # characters of one argument in the log
OBSERVERS = (
    *("MinMaxObserver", "MSEObserver", "PercentileObserver", "KLObserver", "MixObserver"),
    *("ClipObserver", "ClipStdObserver", "FixedScaleObserver"),
)
NAMES = (
    *("set_march", "prepare", "PrepareMethod", "check_qat_model", "set_fake_quantize", "FakeQuantState"),
    *("QConfig", "get_qconfig", "FakeQuantize", "qint8", "qint16", "QuantStub"),
    *("ModuleNameQconfigSetter", "default_calibration_qconfig_setter", *OBSERVERS),
)
"""All public names that the engine uses."""
PLACES = (
    *("quantization", "quantization.qconfig_template", "quantization.qconfig", "quantization.fake_quantize"),
    *("quantization.observer_v2", "march", "dtype"),
)
"""Where they are looked for, before the package itself."""


class Public:
    """The plugin's public names, and the log of what was called. Raises ConfigError if the plugin does not import."""

    def __init__(self) -> None:
        require_plugin()
        try:
            import horizon_plugin_pytorch as plugin
        except Exception as error:  # its libraries may not load
            raise _unusable(error) from error
        self.version = str(getattr(plugin, "__version__", "of unknown version"))
        self.calls: list[EngineCall] = []
        self._modules = _modules(plugin)

    def find(self, name: str) -> Any:
        """Return the object of a public name, or None if no module has it."""
        return next((getattr(module, name) for module in self._modules if hasattr(module, name)), None)

    def __getitem__(self, name: str) -> Any:
        """Return the object of a public name. Raises ConfigError if no module has it."""
        if (found := self.find(name)) is None:
            raise ConfigError(
                f"engine=plugin uses the plugin's {name}, but got version {self.version} without it. See qflow doctor "
                "plugin."
            )
        return found

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a public name, or a method `Name.method`, and log the call.

        Raises TrialError, in one line, for what it raises.
        """
        owner, _, method = name.partition(".")
        function = getattr(self[owner], method) if method else self[owner]
        given = [*map(short, args), *(f"{key}={short(value)}" for key, value in kwargs.items())]
        with self.logged(name, ", ".join(given)):
            return function(*args, **kwargs)

    @contextmanager
    def logged(self, name: str, arguments: str) -> Iterator[None]:
        """Log what runs inside as one call of `name`. Raises TrialError, in one line, for what it raises."""
        start = time.perf_counter()
        try:
            yield
        except QflowError:
            raise
        except Exception as error:  # the plugin may raise anything
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self.calls.append(EngineCall(name, arguments, time.perf_counter() - start, text))
            raise TrialError(
                f"The plugin's {name} takes what its contract says, but got {text:.200}. See qflow doctor plugin."
            ) from error
        self.calls.append(EngineCall(name, arguments, time.perf_counter() - start))


def _unusable(error: Exception) -> ConfigError:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    way_out = "Mend the installation, or use engine=qflow."
    return ConfigError(f"engine=plugin imports horizon_plugin_pytorch, but got {text:.160}. {way_out}")


def _modules(plugin: ModuleType) -> list[ModuleType]:
    """Return the modules that may hold public names, in the order in which they are searched."""
    found = []
    for place in PLACES:
        with suppress(ImportError):
            found.append(importlib.import_module(f"horizon_plugin_pytorch.{place}"))
    return [*found, plugin]


def short(value: Any) -> str:
    """Return a value as the log shows it: shapes in place of tensors, types in place of objects."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(short, value))})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {short(item)}' for key, item in value.items())}}}"
    if isinstance(value, functools.partial):
        given = ", ".join(f"{key}={short(item)}" for key, item in value.keywords.items())
        return f"{getattr(value.func, '__name__', 'partial')}({given})"
    if isinstance(value, (str, int, float, type(None), torch.dtype)):
        return str(value)[:SHORT]
    return str(getattr(value, "name", "") or getattr(value, "__name__", "") or type(value).__name__)[:SHORT]
