"""Libraries that a ready task needs and qflow does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qflow.core.errors import ConfigError


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Let imports of an extra fail in one line. Raises ConfigError, which says what to install."""
    try:
        yield
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError if torch is of another build
        text = " ".join(str(error).split())
        raise ConfigError(
            f"This task needs the extra `{extra}`, but got: {text}. pip install 'qflow[{extra}]', with torch and "
            "torchvision of one build."
        ) from error
