"""Loading models of libraries that have a hub: what fails there is said in one line."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from torch import nn

from qflow.core.errors import ConfigError, ModelError
from qflow.process.hanging import answered

OTHERWISE = "Name a file, task.model.weights=<file>, or take random ones, task.model.pretrained=false."
LOGGERS = ("huggingface_hub", "timm", "transformers", "torch.hub")
REACHED = 5.0  # seconds in which the hub must answer; its client would try for most of a minute, without a word


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
        with _cache_alone_without_network(name, download):
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


@contextmanager
def _cache_alone_without_network(name: str, download: bool) -> Iterator[None]:
    """Say that weights are loaded; let the client of the hub take them from its cache alone if the hub is away."""
    client: Any = sys.modules.get("huggingface_hub.constants")  # it is imported by timm and by transformers
    if os.path.isdir(name):
        yield
        return
    if download and multiprocessing.parent_process() is None:  # a worker loads what its driver has loaded
        print(f"{'weights':<12} {name}: from the cache, or downloaded", file=sys.stderr, flush=True)
    if client is None or client.HF_HUB_OFFLINE or getproxies() or _reached(client.ENDPOINT):
        yield
        return
    client.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        client.HF_HUB_OFFLINE = False


def _reached(address: str) -> bool:
    parts = urlsplit(address)
    place = (parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443))
    with suppress(OSError, UnicodeError):
        answered(lambda: socket.create_connection(place, REACHED).close(), REACHED)
        return True
    return False
