"""Reads measured profiles of Journey 6 boards: three report formats into one dataclass.

Formats. A format is recognised by its keys, never by the file name: hbm_perf has `summary`, hb_analyzer has
`perf_json_data` or `hbm_...` keys, profiler.log has two JSON objects around a `***` line. Absent keys and nulls leave
a field empty; a key that is present must have the type of the format. A number without a unit has the unit of its key;
a kilobyte has 1024 bytes. A report with neither a latency nor a layer is refused.

Layers. A timeline (compiled with debug=True) takes precedence over `layer details`, and these over hb_analyzer's block
times; a list of only the slowest layers is never read, because it is incomplete. A layer's time is the working time of
all units for it (from the timeline, or computing + load + store cost); units overlap, so layers add up to more than the
latency. In a log, a BPU segment counts with its BPU core stage and a CPU node with its total, both as averages.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from qflow.core.errors import ConfigError
from qflow.core.text_file import LARGEST

T = TypeVar("T")
MAC_CLASSES = ("double int8", "feature int16 weight int8", "feature int8 weight int16", "double int16")
NO_LAYER = "(no layer)"  # name for the instructions of a timeline that have no source layer
SECTIONS = ("performance", "DDR access data", "interval info", "layer details", "model info")
ANALYZER_KEYS = ("perf_json_data", "hbm_block_time", "hbm_op_time_by_type", "hbm_ddr_bytes_per_run")
COSTS = ("computing cost (no DDR)", "load cost", "store cost")
TRAFFIC = ("loaded bytes per run", "stored bytes per run")
TIMES = {"ns": 1e-6, "us": 1e-3, "µs": 1e-3, "μs": 1e-3, "ms": 1.0, "s": 1e3}  # in milliseconds
BYTES = {"b": 1, "byte": 1, "bytes": 1, "kb": 2**10, "kib": 2**10, "mb": 2**20, "mib": 2**20, "gb": 2**30, "gib": 2**30}
COUNTS = {"": 1, "fps": 1}
_NUMBER = re.compile(r"([0-9]+(?:,[0-9]{3})*(?:\.[0-9]*)?(?:e[-+]?[0-9]+)?)\s*([a-zµμ]*)\s*(?:\(.*\))?", re.I)
_DIVIDER = re.compile(r"^[ \t]*\*{3}[^\n]*$", re.M)
_CPU_NODE = re.compile(r"Node-[0-9]+-CPU-(.+)")


@dataclass(frozen=True)
class LayerTime:
    """One layer of a report, and the device time in milliseconds that it takes, summed over the units."""

    name: str  # as in the report; several source layers of one instruction are joined with a comma
    ms: float
    ops: tuple[str, ...] = ()  # origin ops or source layers, if the report lists them
    units: Mapping[str, float] = field(default_factory=dict)  # TAE, VAE, LOAD, ... -> ms; only from a timeline

    @property
    def host(self) -> bool:
        """True for a node on the CPU."""
        return _CPU_NODE.match(self.name) is not None


@dataclass(frozen=True)
class MeasuredProfile:
    """The content of a report on one model; a field is None, "" or empty if the report does not have it.

    `total_ms` is the latency of a run in milliseconds: on the BPU (hbm_perf, hb_analyzer), or the average on the host,
    with queues and CPU nodes (hrt_model_exec). `overlap` is 1 - period / sum of working times of a timeline; it is
    negative if the units are idle for longer than they overlap.
    """

    kind: str  # hbm_perf, hb_analyzer or hrt_model_exec
    path: str
    march: str = ""
    toolchain: str = ""  # version of the compiler (HBDK); of the runtime (UCP) for hrt_model_exec
    total_ms: float | None = None
    fps: float | None = None
    layers: tuple[LayerTime, ...] = ()
    ddr_bytes: int | None = None  # loaded and stored in one run
    memory_bytes: int | None = None  # minimum memory requirement
    macs: Mapping[str, int] = field(default_factory=dict)  # one of MAC_CLASSES -> MACs a run
    cpu_ops: tuple[str, ...] = ()  # operators that the report places on the CPU
    overlap: float | None = None


def read_profile(path: str | Path) -> MeasuredProfile:
    """The report at `path`: hbm_perf JSON, hb_analyzer's analysis_summary.json or hrt_model_exec's profiler.log.

    Raises ConfigError, always in one line, for a file that cannot be read, is cut off or is none of the three.
    """
    try:
        text = _text(Path(path))
        is_log = text.startswith("ucp_version") or _DIVIDER.search(text)
        found = _log(text) if is_log else _report(_object(text, "A profile"))
        if found.total_ms is None and not found.layers:
            raise ConfigError("A profile holds a latency or layer times, but got neither")
    except ConfigError as error:
        where = " ".join(str(path).splitlines())
        way = "Export it again with hbm_perf, hb_analyzer or hrt_model_exec"
        raise ConfigError(f"{error} in {where}. {way}.") from None
    return replace(found, path=str(path))


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for a writer
            raise ConfigError("A profile is a file, but got a folder, pipe or device")
        if path.is_file() and path.stat().st_size > LARGEST:
            raise ConfigError(f"A profile is a file of at most {LARGEST} bytes, but got a larger one")
        text = path.read_bytes().decode("utf-8-sig").strip()
    except OSError as error:
        raise ConfigError(f"A profile is a file that can be read, but got {error.strerror!r}") from None
    except ValueError:  # not UTF-8, or a path with a null character
        raise ConfigError("A profile is a text file, but got binary data") from None
    if not text:
        raise ConfigError("A profile is a text file, but got an empty one")
    return text


def _object(text: str, what: str) -> dict[str, Any]:
    try:
        return _typed(json.loads(text), dict, what)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is complete JSON, but got a fault ({' '.join(str(error).split())})") from None


def _report(data: dict[str, Any]) -> MeasuredProfile:
    if any(key in data for key in ANALYZER_KEYS):
        return _analyzer(data)
    summary = data.get("summary")
    if isinstance(summary, dict) and ("details" in data or any(key in summary for key in SECTIONS)):
        return _perf(data)
    keys = ascii(sorted(data)[:3])[:90]
    raise ConfigError(f"A profile has summary, perf_json_data or perf_result, but got the keys {keys}")


def _perf(data: dict[str, Any]) -> MeasuredProfile:
    summary = _typed(data.get("summary"), dict, "summary")
    speed, ddr, info = (_typed(summary.get(k), dict, k) for k in ("performance", "DDR access data", "model info"))
    timeline, overlap = _timeline(data.get("details"))
    macs = {name: _first(info, COUNTS, {f"{name} macs": ""}) for name in MAC_CLASSES}
    memory = _first(ddr, BYTES, {"min memory requirement": "b"})
    return MeasuredProfile(
        "hbm_perf",
        "",
        march=_typed(info.get("BPU march"), str, "BPU march"),
        toolchain=_typed(info.get("compiling HBDK version"), str, "compiling HBDK version"),
        total_ms=_first(speed, TIMES, {"latency (ms)": "ms", "latency (us)": "us"}),
        fps=_first(speed, COUNTS, {"FPS": ""}),
        layers=timeline or tuple(_detail(row) for row in _rows(summary.get("layer details"), "layer details")),
        ddr_bytes=_ddr(ddr),
        memory_bytes=None if memory is None else round(memory),
        macs={name: round(count) for name, count in macs.items() if count is not None},
        overlap=overlap,
    )


def _ddr(ddr: dict[str, Any]) -> int | None:
    """Exact bytes if the report has both directions, else the rounded megabytes."""
    if all(ddr.get(key) is not None for key in TRAFFIC):
        return round(sum(_quantity(ddr, key, BYTES, "b") for key in TRAFFIC))
    rounded = _first(ddr, BYTES, {"DDR megabytes per run": "mb"})
    return None if rounded is None else round(rounded)


def _timeline(details: Any) -> tuple[tuple[LayerTime, ...], float | None]:
    """Working time of each source layer by unit, and the overlap; no layers if no instruction names its source."""
    cores = list(details.values()) if isinstance(details, dict) else _typed(details, list, "details")
    work: dict[tuple[str, ...], dict[str, float]] = {}
    starts, ends, total = [], [], 0.0
    for row in (row for core in cores for row in _rows(core, "details of a core")):
        ms = _quantity(row, "working_time (us)", TIMES, "us")
        starts.append(_quantity(row, "start_time (us)", TIMES, "us"))
        ends.append(starts[-1] + ms)
        total += ms
        units = work.setdefault(_names(row.get("source_layer_names"), "source_layer_names"), {})
        unit = _name(row, "inst_type")
        units[unit] = units.get(unit, 0.0) + ms
    overlap = 1.0 - (max(ends) - min(starts)) / total if total else None
    layers = tuple(LayerTime(", ".join(n) or NO_LAYER, sum(u.values()), n, u) for n, u in work.items())
    return layers if any(work) else (), overlap


def _detail(row: dict[str, Any]) -> LayerTime:
    costs = [key for key in COSTS if row.get(key) is not None] or COSTS[:1]
    origin = row.get("origin ops")  # some versions count them, some list them
    ops = () if isinstance(origin, (int, float)) else _names(origin, "origin ops")
    return LayerTime(_name(row, "layer name"), sum(_quantity(row, key, TIMES, "us") for key in costs), ops)


def _analyzer(data: dict[str, Any]) -> MeasuredProfile:
    perf = _perf(_typed(data.get("perf_json_data"), dict, "perf_json_data"))
    blocks = _rows(data.get("hbm_block_time"), "hbm_block_time")
    layers = tuple(LayerTime(_name(row, "block"), _quantity(row, "total_time_us", TIMES, "us")) for row in blocks)
    ddr, cpu = data.get("hbm_ddr_bytes_per_run"), data.get("bc_quantized_model_cpu_ops")
    traffic = _ddr(ddr if isinstance(ddr, dict) else dict(zip(TRAFFIC, (ddr, 0), strict=True)))
    rows = list(cpu) if isinstance(cpu, dict) else _typed(cpu, list, "bc_quantized_model_cpu_ops")
    return replace(
        perf,
        kind="hb_analyzer",
        layers=perf.layers or layers,
        ddr_bytes=perf.ddr_bytes if traffic is None else traffic,
        cpu_ops=tuple(_name(row if isinstance(row, dict) else {"name": row}, "name") for row in rows),
    )


def _log(text: str) -> MeasuredProfile:
    first, _, rest = text.partition("\n") if text.startswith("ucp_version") else ("", "", text)
    parts = [part for part in _DIVIDER.split(rest) if part.strip()]
    if len(parts) != 2:
        raise ConfigError(f"A profiler.log has two JSON objects around a *** line, but got {len(parts)}")
    run, nodes = (_object(part, "Each part of a profiler.log") for part in parts)
    if "perf_result" not in run or not {"model_latency", "processor_latency"} & set(nodes):
        keys = ascii([*sorted(run)[:2], *sorted(nodes)[:2]])[:90]
        raise ConfigError(f"A profiler.log has perf_result and then model_latency, but got the keys {keys}")
    result = _typed(run["perf_result"], dict, "perf_result")
    layers = tuple(_node(*item) for item in _typed(nodes.get("model_latency"), dict, "model_latency").items())
    return MeasuredProfile(
        "hrt_model_exec",
        "",
        toolchain=first.partition(":")[2].strip(),
        total_ms=_first(result, TIMES, {"average_latency": "ms"}),
        fps=_first(result, COUNTS, {"FPS": ""}),
        layers=layers,
        cpu_ops=tuple(op for layer in layers for op in layer.ops),
    )


def _node(name: str, stages: Any) -> LayerTime:
    """A segment on the BPU consists of many operators, so only a CPU node has the name of an operator."""
    cpu = _CPU_NODE.match(name)
    stages = _typed(stages, dict, "a node of model_latency")
    wanted = next((stage for stage in stages if stage.endswith("BpuCoreProcess")), "Total")
    average = _quantity(_typed(stages.get(wanted), dict, wanted), "avg_time", TIMES, "ms")
    return LayerTime(name, average, (cpu[1],) if cpu else ())


def _typed(value: Any, kind: type[T], what: str) -> T:
    """`value` checked to be a `kind`; an empty one for null."""
    if value is not None and not isinstance(value, kind):
        rules: dict[type, str] = {dict: "a JSON object", list: "a JSON list", str: "a text"}
        raise ConfigError(f"{what} is {rules[kind]}, but got {_shown(value)}")
    return kind() if value is None else value


def _rows(value: Any, what: str) -> list[dict[str, Any]]:
    return [_typed(row, dict, f"each of {what}") for row in _typed(value, list, what)]


def _names(value: Any, what: str) -> tuple[str, ...]:
    """Names from a list, or from one text with commas; each once."""
    names = value.split(",") if isinstance(value, str) else _typed(value, list, what)
    return tuple(dict.fromkeys(name for given in names if (name := _typed(given, str, what).strip())))


def _name(row: dict[str, Any], key: str) -> str:
    name = _typed(row.get(key), str, key).strip()
    if not name:
        raise ConfigError(f"{key} is a name, but got nothing")
    return name


def _shown(value: Any) -> str:
    return {dict: "an object", list: "a list", type(None): "nothing"}.get(type(value)) or ascii(value)[:40]


def _first(row: dict[str, Any], units: Mapping[str, float], keys: Mapping[str, str]) -> float | None:
    """The first of `keys` (key -> its unit) that is present."""
    return next((_quantity(row, key, units, unit) for key, unit in keys.items() if row.get(key) is not None), None)


def _quantity(row: dict[str, Any], key: str, units: Mapping[str, float], unit: str) -> float:
    """A number (59, "59 us", "1.5 ms (8.2% of model)") in the base unit; `unit` is its unit if none is written."""
    value = row.get(key)
    match = _NUMBER.fullmatch(str(value).strip()) if isinstance(value, (str, int, float)) else None
    factor = units.get(match[2].lower() or unit) if match else None
    result = float(match[1].replace(",", "")) * factor if match and factor else math.inf
    if math.isinf(result):
        raise ConfigError(f"{key} is a number, 0 or more (in {'/'.join(filter(None, units))}), but got {_shown(value)}")
    return result
