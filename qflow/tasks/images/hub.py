"""Loading models of libraries that have a hub: what fails there is said in one line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from qflow.core.errors import ConfigError, ModelError

OTHERWISE = "Name a file, task.model.weights=<file>, or take random ones, task.model.pretrained=false."
LOGGERS = ("huggingface_hub", "timm", "transformers", "torch.hub")


def from_hub(
    build: Callable[[], Any], name: str | None, download: bool, names: str, otherwise: str = OTHERWISE
) -> nn.Module:
    """What `build` returns, in eval mode; `names` says where the library lists its models.

    Raises ConfigError for a model that the library does not know, ModelError for weights that cannot be loaded.
    """
    if name is None:
        raise ConfigError(f"task.model.name is one of {names}, but got none. Set task.model.name=<model>.")
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in LOGGERS}
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # the client prints each of its tries
    try:
        model: nn.Module = build().eval()
    except (ConfigError, ModelError):
        raise
    except Exception as error:  # libraries and the hub's client raise many types
        text = (" ".join(str(error).split()) or type(error).__name__)[:160]
        if download and isinstance(error, OSError):  # of the network, or of the cache
            raise ModelError(
                f"Pretrained weights of {name} are in the cache or can be downloaded, but got: {text}. {otherwise}"
            ) from error
        raise ConfigError(f"task.model.name is one of {names}, but got {name}: {text}.") from error
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
    return model
