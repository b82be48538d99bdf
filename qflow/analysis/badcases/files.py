"""Inputs of bad cases, kept while searching, and the plugin's files `badcase.txt`, `badcase.pt`, `all_badcase_info.pt`.

The `.pt` files hold builtin types and tensors only: `torch.load(weights_only=True)` reads them.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from qflow.analysis.measures.tables import BadcaseTable, text_table
from qflow.core.errors import DataError
from qflow.core.settings import COMPARISONS
from qflow.quant.trace.calling import cut
from qflow.quant.trace.state import Frame

SHOWN = tuple(metric for metric in COMPARISONS if metric != "Atol")  # the guide's columns
CASE_FILE, INFO_FILE = "badcase.pt", "all_badcase_info.pt"
CHOSEN = "chosen"  # key in the dict of samples: the file keeps the plugin's three entries, looked up by sample
Attrs = tuple[Any, Any]
"""Cached attributes of the float and of the calibrated model; None if there are none."""


@dataclass
class BadcaseInputs:
    """Model inputs of the samples that matter, by sample: batches of one, on the CPU.

    `find_badcases` keeps the inputs of the worst samples so far in it, and at the end those of the chosen samples and
    of every index in the table. `missing` are chosen samples that became candidates only after their batch had passed.
    """

    samples: dict[int, Any] = field(default_factory=dict)
    missing: tuple[int, ...] = ()

    def update(self, inputs: Any, first: int, size: int, wanted: Collection[int]) -> None:
        """Keep the `wanted` samples of a batch that begins with sample `first`; drop those no longer wanted."""
        for index in [i for i in self.samples if i not in wanted]:
            del self.samples[index]
        for index in wanted:
            if first <= index < first + size and index not in self.samples:
                one = cut(inputs, size, index - first, index - first + 1)
                self.samples[index] = tree_map(_kept, one)

    def finish(self, table: BadcaseTable) -> None:
        """Keep only the samples that the table names."""
        wanted = set(named_samples(table))
        self.samples = {i: self.samples[i] for i in sorted(self.samples) if i in wanted}
        self.missing = tuple(i for i in table.chosen if i not in self.samples)


def _kept(value: Any) -> Any:
    # A slice would keep its whole batch alive.
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def named_samples(table: BadcaseTable) -> Iterable[int]:
    """All samples that the table names: the chosen ones, then the worst of outputs and metrics."""
    columns = [table.worst, table.worst_raw, *table.index.values()]
    return dict.fromkeys([*table.chosen, *(i for column in columns for i in column.values())])


@dataclass(frozen=True)
class SavedBadcases:
    """Content of the files: the bad case, and, if there is an `all_badcase_info.pt`, the table it was chosen from.

    `inputs` and `attrs` are those of the bad case; `index[output][metric]` and `worst[metric]` are samples, `samples`
    their (inputs, attrs), and `chosen` the bad cases, worst first (empty in files of older versions).
    """

    inputs: Any
    attrs: Attrs = (None, None)
    index: dict[str, dict[str, int]] = field(default_factory=dict)
    worst: dict[str, int] = field(default_factory=dict)
    samples: dict[int, tuple[Any, Attrs]] = field(default_factory=dict)
    chosen: tuple[int, ...] = ()


def badcase_text(table: BadcaseTable) -> str:
    """The guide's three tables: its five metrics, and the user's own if there is one."""
    shown = [*SHOWN, *(m for m in table.worst if m not in COMPARISONS)]
    index = [[n, *(table.shown(row[m]) for m in shown)] for n, row in table.index.items()]
    value = [[n, *(f"{row[m]:.6g}" for m in shown)] for n, row in table.value.items()]
    worst = [[m, table.shown(table.worst[m])] for m in shown]
    frames = ["An index is sequence:frame, both from 0."] if table.sequences else []
    return "\n".join(
        [
            "The bad case input index of each output:",
            text_table(["Name/Index", *shown], index),
            "The metric results of each badcase:",
            text_table(["Name/Index", *shown], value),
            "The bad case input index of the worst output:",
            text_table(["metric", "dataloader index"], worst),
            *frames,
        ]
    )


def save_badcases(
    folder: Path, table: BadcaseTable, inputs: BadcaseInputs, attrs: Mapping[int, Attrs] | None = None
) -> None:
    """Write `badcase.txt`, `badcase.pt` (the first chosen sample) and `all_badcase_info.pt` into `folder`.

    `attrs` are cached attributes by sample; the state of a frame is stored as those of both models. Raises DataError if
    the inputs of that sample were not kept, or hold anything but tensors and builtin types.
    """
    case = table.chosen[0]
    if case not in inputs.samples:
        raise DataError(
            f"Files of bad cases hold inputs, but got none of sample {case}. Give `inputs` to find_badcases."
        )
    held: dict[int, Any] = {i: _builtin(_parts(x, (attrs or {}).get(i))) for i, x in inputs.samples.items()}
    rows = [[name, *(row[metric] for metric in SHOWN)] for name, row in table.index.items()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "badcase.txt").write_text(badcase_text(table))
    torch.save((held[case][0], *held[case][1]), folder / CASE_FILE)
    samples: dict[Any, Any] = dict(held)
    samples[CHOSEN] = [i for i in table.chosen if i in held]
    torch.save((rows, dict(table.worst), samples), folder / INFO_FILE)


def _parts(case: Any, attrs: Attrs | None) -> tuple[Any, Attrs]:
    if isinstance(case, Frame):
        return case.inputs, (case.state, case.state)
    return case, attrs or (None, None)


def load_badcases(folder: Path) -> SavedBadcases:
    """Read the files of `save_badcases`. Raises DataError if `badcase.pt` is missing or cannot be read."""
    inputs, *attrs = _read(folder / CASE_FILE, 3)
    if not (folder / INFO_FILE).exists():
        return SavedBadcases(inputs, (attrs[0], attrs[1]))
    rows, worst, samples = _read(folder / INFO_FILE, 3)
    chosen = samples.pop(CHOSEN, ())
    index = {str(row[0]): dict(zip(SHOWN, row[1:], strict=False)) for row in rows}
    return SavedBadcases(inputs, (attrs[0], attrs[1]), index, worst, samples, tuple(chosen))


def _read(path: Path, length: int) -> Any:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise DataError(
            f"Bad cases are read from {path.name}, but got {type(error).__name__} in {path.parent}."
        ) from error
    if not isinstance(found, (tuple, list)) or len(found) != length:
        raise DataError(f"{path.name} holds {length} entries, but got {type(found).__name__}. Save it again.")
    return found


def _builtin(value: Any) -> Any:
    """The same content in tensors, tuples, lists, dicts and plain values."""
    if isinstance(value, Tensor):
        return value.detach().as_subclass(Tensor)
    if isinstance(value, Mapping):
        return {key: _builtin(item) for key, item in value.items()}
    if isinstance(value, (tuple, list, deque)):
        return (tuple if isinstance(value, tuple) else list)(_builtin(item) for item in value)
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise DataError(f"Inputs are saved as tensors and builtin types, but got {type(value).__name__}. Convert it.")
