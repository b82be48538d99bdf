"""`.pt` files as data: nothing of them runs, and nothing but tensors, dtypes and builtin values comes out.

The archive is looked at before torch reads it: its size, that its parts are stored as they are (a compressed part may
grow without bound), and every global that its pickle names. Classes of the plugin and of torch.nn that a table holds
(op_type, dtypes) become texts: a class of this module stands in for each, so that the plugin need not be installed.
"""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

from qflow.core.text_file import require_file
from qflow.imports.records import ImportFileError

LARGEST = 16 << 30  # bytes; tensors are mapped into memory, not read
MOST_PICKLE = 32 << 20
FOREIGN = ("horizon_plugin_pytorch.", "horizon_plugin_profiler.", "torch.nn.", "torch.ao.", "changan_plugin_pytorch.")
"""Packages whose classes become texts."""
PLAIN = frozenset(
    {
        "collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter",
        "torch.serialization._get_layout", "torch.device", "torch.Size",
        *(f"torch.{kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char",
          "Byte", "Bool", "Untyped")),
        *(f"torch.{name}" for name in ("float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64",
          "uint8", "bool", "qint8", "quint8", "qint32")),
    }
)  # fmt: skip


class Named(str):
    """A value of a foreign class, as a text: that of its first argument if it is one."""

    def __new__(cls, *args: Any) -> Named:
        """Take any arguments; the class is made by whatever the file calls."""
        return super().__new__(cls, args[0] if args and isinstance(args[0], str) else cls.__name__)

    def __setstate__(self, state: Any) -> None:
        """Keep nothing of a state."""


def load(path: Path) -> Any:
    """Return the value in a `.pt` file. Raises ImportFileError for a file that holds more than plain data."""
    import torch

    rule = "A .pt file is one of torch.save with tensors and builtin values"
    shown = require_file(path, rule, LARGEST)
    if not zipfile.is_zipfile(path):
        raise ImportFileError(f"{rule}, but got {shown}, which is no archive of torch.save. Save it again.")
    try:
        foreign = _checked(path, rule, shown)
        stand_ins = [(type(name.rpartition(".")[2], (Named,), {}), name) for name in foreign]
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except ImportFileError:
        raise
    except Exception as error:
        words = " ".join(str(error).split())[:120]
        raise ImportFileError(f"{rule}, but got {shown}: {words}. Save it with builtin types.") from error


def _checked(path: Path, rule: str, shown: str) -> list[str]:
    """Return the globals of FOREIGN that the pickle names. Raises ImportFileError for others."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ImportFileError(f"{rule}, but got {shown} with compressed parts. Save it again.")
        data = next((part for part in parts if part.filename.endswith("/data.pkl")), None)
        if data is None:
            raise ImportFileError(f"{rule}, but got {shown} without values. Save it again.")
        if data.file_size > MOST_PICKLE:
            raise ImportFileError(f"{rule}, but got {shown} with {data.file_size} bytes of names. Name another file.")
        found = list(dict.fromkeys(_globals(archive.read(data))))
    odd = [name for name in found if name not in PLAIN and not name.startswith(FOREIGN)]
    if odd:
        raise ImportFileError(f"{rule}, but got {odd[0]!a:.80} in {shown}. Save it with builtin types.")
    return [name for name in found if name not in PLAIN]


def _globals(data: bytes) -> list[str]:
    found = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL":
            found.append(str(argument).replace(" ", "."))
        elif opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise pickle.UnpicklingError(f"the pickle opcode {opcode.name}")
    return found
