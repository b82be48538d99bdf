"""Tells the user's code from that of libraries and of qflow, and computes fingerprints of source files.

The user's code is every loaded module outside the standard library and site-packages. All files of qflow are hashed;
those of `workflows` are not, because they only order steps and change no result. torch, numpy and the standard library
are identified by their versions. Another package in site-packages may be the user's own and may change without a new
version, so its loaded modules are hashed if a model, metric or data set comes from it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import sysconfig
from collections.abc import Collection
from pathlib import Path

from qflow.core.record import DIGEST_CHARS

OURS = Path(__file__).parents[1]
VERSIONED = {*sys.stdlib_module_names, "torch", "numpy", "qflow", "workflows"}
LIBRARIES = tuple(
    f"{folder}{os.sep}"
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), OURS, OURS.parent / "workflows")
)
INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")


def package_of(module: str | None) -> str:
    """The top-level package of a dotted module name."""
    return (module or "").partition(".")[0]


@functools.lru_cache(maxsize=4096)
def belongs_to_user(module: str | None) -> bool:
    """True if `module` is the user's own: its file is outside all libraries, or it has no file (a notebook)."""
    if package_of(module) in VERSIONED - {"__main__"}:
        return False
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return file is None or _outside(file)


def loaded_modules(packages: Collection[str] = ()) -> dict[str, str]:
    """Fingerprints of all loaded modules that are the user's or belong to one of `packages`, by name."""
    found, wanted = {}, set(packages) - VERSIONED
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__dict__", {}).get("__file__")  # getattr would make a lazy module import itself
        if isinstance(file, str) and (_outside(file) or package_of(name) in wanted) and os.path.isfile(file):
            found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found


def loaded_sources(packages: Collection[str] = ()) -> str:
    """Fingerprint of all of `loaded_modules`."""
    lines = (f"{name}:{digest}\n" for name, digest in loaded_modules(packages).items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:DIGEST_CHARS]


def own_sources() -> str:
    """Fingerprint of qflow's own source, so that results of another version are not used."""
    sha = hashlib.sha256()
    for path in sorted(OURS.rglob("*.py")):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:DIGEST_CHARS]


def _outside(file: str) -> bool:
    return not file.startswith(LIBRARIES) and not any(part in file for part in INSTALLED)
