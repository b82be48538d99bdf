"""Where the files of a data set lie: a folder, a zip or tar archive, or a data set that `datasets` has saved to disk.

A source lists its files under their relative paths, sorted, and reads one of them when asked. It can be used in the
worker processes of a DataLoader. Nothing of an archive is written under a name that the archive states.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from qflow.core.errors import DataError
from qflow.core.temporary import folder_of
from qflow.tasks.files.needs import needs

PACKED: tuple[tuple[bytes, Callable[..., Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ", lzma.open),
)
"""How a compressed tar begins."""
OF_DATASETS = ("dataset_dict.json", "dataset_info.json")


class Source(Protocol):
    """Files by relative path."""

    @property
    def names(self) -> Sequence[str]:
        """All files, sorted."""

    @property
    def classes(self) -> Sequence[str]:
        """Class folders in the order of their numbers; empty: sorted by name."""

    def read(self, name: str) -> bytes:
        """The content of a file. Raises OSError or ValueError."""


def source_of(root: str | None, key: str = "task.data.root") -> Source:
    """What lies at `root`. Raises DataError for anything else than a folder, zip or tar."""
    rule = f"{key} is a folder, a .zip or a .tar"
    if root is None:
        raise DataError(f"{rule}, but got none. Set {key}=<folder>.")
    path = Path(os.path.expanduser(root))
    if path.is_dir():
        return Saved(path) if any((path / name).is_file() for name in OF_DATASETS) else Folder(path)
    if not path.is_file():
        raise DataError(f"{rule}, but got {root}, which is not there. Check the path.")
    try:
        return Zip(path) if zipfile.is_zipfile(path) else Tar(path)
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{rule}, but got {root}: {' '.join(str(error).split())}. Check the file.") from error


def visible(name: str) -> bool:
    """False for what systems add: hidden files, and the folder of macOS's archives."""
    return not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


class Folder:
    """The files below a folder."""

    classes: Sequence[str] = ()

    def __init__(self, root: Path) -> None:
        self.root, seen, found = root, set[str](), list[str]()
        for folder, below, files in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # a link that leads back
                below.clear()
                continue
            seen.add(real)
            found += [Path(folder, file).relative_to(root).as_posix() for file in files]
        self.names = sorted(filter(visible, found))

    def read(self, name: str) -> bytes:
        """The content of a file."""
        return (self.root / name).read_bytes()


class Zip:
    """The files of a zip archive, without a folder that holds all of them."""

    classes: Sequence[str] = ()

    def __init__(self, path: Path) -> None:
        self.path, self._open = path, dict[int, zipfile.ZipFile]()
        with zipfile.ZipFile(path) as archive:
            self._names = _below([i.filename for i in archive.infolist() if not i.is_dir() and visible(i.filename)])
        self.names = sorted(self._names)

    def read(self, name: str) -> bytes:
        """The content of a file; each process opens the archive for itself."""
        if os.getpid() not in self._open:
            self._open[os.getpid()] = zipfile.ZipFile(self.path)
        try:
            return self._open[os.getpid()].read(self._names[name])
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # of another method, or encrypted
            raise ValueError(str(error)) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


class Tar:
    """The files of a tar archive, without a folder that holds all of them. A compressed one is expanded once."""

    classes: Sequence[str] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            begin = file.read(6)
        unpack = next((opened for magic, opened in PACKED if begin.startswith(magic)), None)
        if unpack is not None:
            self.path = folder_of(self) / "data.tar"
            with unpack(path, "rb") as packed, self.path.open("wb") as plain:
                shutil.copyfileobj(packed, plain)
        with tarfile.open(self.path, "r:") as archive:
            members = {m.name.removeprefix("./"): (m.offset_data, m.size) for m in archive if m.isreg()}
        inside = _below([name for name in members if visible(name)])
        self._places = {name: members[whole] for name, whole in inside.items()}
        self.names = sorted(self._places)

    def read(self, name: str) -> bytes:
        """The content of a file."""
        offset, size = self._places[name]
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


class Saved:
    """A data set that `datasets` has saved with save_to_disk: an image column, and classes or an image of classes.

    Its samples have the names of files in the usual folders: `train/<class>/00000012.png`, or `train/images/...` and
    `train/masks/...`.
    """

    def __init__(self, path: Path) -> None:
        with needs("huggingface"):
            import datasets
        found = datasets.load_from_disk(str(path))
        splits = dict(found) if isinstance(found, dict) else {"": found}
        self._columns: dict[str, tuple[Any, str]] = {}
        self._rows: dict[str, tuple[Any, int, str]] = {}
        for split, table in splits.items():
            self._add(f"{split}/" if split else "", table, datasets, str(path))
        self.names = sorted(self._rows)

    def _add(self, split: str, table: Any, datasets: Any, path: str) -> None:
        images = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
        labels = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
        if not images:
            raise DataError(
                f"A data set on disk has an image column, but got {list(table.features)} in {path}. Add it."
            )
        for name in images:  # bytes as they are: an image is decoded when its sample is read
            table = table.cast_column(name, datasets.Image(decode=False))
        if len(images) > 1:
            for folder, column in zip(("images", "masks"), images, strict=False):
                for row in range(len(table)):
                    self._rows[f"{split}{folder}/{row:08d}.png"] = table, row, column
            return
        self.classes = [name.replace("/", "_") for name in table.features[labels[0]].names] if labels else ()
        numbers = table[labels[0]] if labels else [None] * len(table)
        for row, number in enumerate(numbers):
            folder = "" if number is None else f"{self.classes[number]}/"
            self._rows[f"{split}{folder}{row:08d}.png"] = table, row, images[0]

    classes: Sequence[str] = ()

    def read(self, name: str) -> bytes:
        """The file of an image."""
        table, row, column = self._rows[name]
        found = table[row][column]
        return bytes(found["bytes"]) if found["bytes"] is not None else Path(found["path"]).read_bytes()


def _below(names: Sequence[str]) -> dict[str, str]:
    """Names without the folders that all of them share -> the names in the archive."""
    shared = os.path.commonpath([os.path.dirname(name) for name in names]) if names else ""
    return {name[len(shared) :].lstrip("/"): name for name in names}
