"""The packages of qflow, their order, and what each file imports, read from the source.

    python tests/support/architecture.py        draws docs/architecture.svg

tests/test_architecture.py holds the code to this order, and the picture to the code.
"""

from __future__ import annotations

import ast
import re
import textwrap
from functools import cache
from html import escape
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "architecture.svg"

LAYERS: tuple[dict[str, int], ...] = (
    {"core": 3, "process": 0},
    {"executor": 0, "quant": 1, "cost_model": 2, "tasks": 3, "search": 4, "tracking": 5},
    {"analysis": 1, "repair": 2},
    {"trial": 3},
    {"config": 0, "report": 3, "plugin": 4},
    {"bundle": 2, "imports": 0},
    {"api": 1, "study": 5},
    {"export": 2},
    {"workflows": 3, "commands": 4},
)
"""From the ground up. A package imports from lower layers only, never from its own.

The number is the package's column in the picture, chosen so that no arrow passes behind a box.
"""

SUBPACKAGES = {
    "quant": (("trace", "values"), ("model",), ("replay", "train")),
    "analysis": (("measures",), ("badcases", "layers", "sensitivity", "checks"), ("advice",)),
    "repair": (("base",), ("equalization", "calibration", "weights")),
    "tasks": (("perception", "files", "metrics"), ("detection", "images"), ("starters",)),
}
"""The same within a package."""


@cache
def files() -> dict[str, Path]:
    """Every module of qflow and workflows by its dotted name; workflows as `workflows.<name>`."""
    found = {}
    for path in sorted([*(ROOT / "qflow").rglob("*.py"), *(ROOT / "workflows").glob("*.py")]):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def package_of(module: str) -> str:
    """`qflow.quant.trace.tape` -> `quant`; `workflows.full` -> `workflows`; a file of qflow/ itself -> ``."""
    parts = module.split(".")
    if parts[0] == "workflows":
        return "workflows"
    return parts[1] if len(parts) > 1 and (ROOT / "qflow" / parts[1]).is_dir() and not is_command(module) else ""


def is_command(module: str) -> bool:
    """True for a file right in qflow/, or the `__main__` of a package: `python -m qflow.<name>`."""
    own = module.removesuffix(".__main__") if module.count(".") == 2 else module
    return own.count(".") == 1 and own.startswith("qflow.") and files()[module].name != "__init__.py"


def imported(path: Path) -> list[str]:
    """Dotted names that a file imports: at the top, in functions, for type checkers; relative ones resolved."""
    folder = ".".join(path.parent.relative_to(ROOT).parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), folder)
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


@cache
def arrows() -> dict[str, frozenset[str]]:
    """Module -> modules of qflow and workflows that it imports."""
    found = {}
    for name, path in files().items():
        named = [text.removeprefix("qflow.") if text.startswith("qflow.workflows") else text for text in imported(path)]
        found[name] = frozenset(filter(None, map(_module, named))) - {name}
    return found


def _module(name: str) -> str | None:
    """The module that `a.b.c` means: itself, or `a.b` where c is a name in it."""
    return next((n for n in (name, name.rpartition(".")[0]) if n in files()), None)


def package_arrows() -> set[tuple[str, str]]:
    """Pairs of packages of which the first imports from the second."""
    pairs = {(package_of(a), package_of(b)) for a, targets in arrows().items() for b in targets}
    return {(a, b) for a, b in pairs if a and b and a != b}


def layer_of(package: str) -> int:
    """Place of a package in LAYERS, 0 at the ground."""
    return next(i for i, layer in enumerate(LAYERS) if package in layer)


# ---- the picture -----------------------------------------------------------------------------------------------

BOX, HEIGHT, GAP = 210, 94, 48


def draw() -> str:
    """Packages by layer, with what each is for, and the imports between them.

    Arrows that follow from others are left out.
    """
    places = {}
    for level, layer in enumerate(reversed(LAYERS)):
        for package, column in layer.items():
            places[package] = 12 + column * (BOX + 16), 12 + level * (HEIGHT + GAP)
    lines = [_line(*places[a], *places[b]) for a, b in sorted(_direct(package_arrows()))]
    boxes = [_box(package, *place) for package, place in places.items()]
    width, height = 6 * (BOX + 16) + 8, 24 + len(LAYERS) * (HEIGHT + GAP) - GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif">\n<rect width="100%" height="100%" fill="white"/>\n'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#667"/></marker></defs>'
    )
    return "\n".join([head, *lines, *boxes, "</svg>"]) + "\n"


def _direct(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Pairs without those that follow from others."""
    below: dict[str, set[str]] = {}
    for layer in LAYERS:
        for package in layer:
            near = {b for a, b in pairs if a == package}
            below[package] = near.union(*(below[b] for b in near))
    return {(a, b) for a, b in pairs if not any((a, c) in pairs and b in below[c] for c in below)}


def _line(x: float, y: float, to_x: float, to_y: float) -> str:
    start, end = (x + BOX / 2, y + HEIGHT), (to_x + BOX / 2, to_y)
    bend = (end[1] - start[1]) / 2
    points = [start, (start[0], start[1] + bend), (end[0], end[1] - bend), end]
    first, *rest = [f"{left:g} {top:g}" for left, top in points]
    return f'<path d="M{first} C{" ".join(rest)}" fill="none" stroke="#99a" stroke-width="1.4" marker-end="url(#tip)"/>'


def _box(package: str, x: float, y: float) -> str:
    folder = ROOT / package if package == "workflows" else ROOT / "qflow" / package
    purpose = re.split(r"\.(?:\s|$)", ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "")[0]
    rows = textwrap.wrap(purpose.replace("`", ""), 31)
    texts = [
        f'<text x="{x + 10:g}" y="{y + 20:g}" font-size="14" font-weight="bold">{package}/</text>',
    ]
    texts += [
        f'<text x="{x + 10:g}" y="{y + 37 + 14 * i:g}" font-size="11" fill="#334">{escape(row)}</text>'
        for i, row in enumerate(rows)
    ]
    frame = f'<rect x="{x:g}" y="{y:g}" width="{BOX}" height="{HEIGHT}" rx="5" fill="#eef3f8" stroke="#456"/>'
    return "\n".join([frame, *texts])


if __name__ == "__main__":
    PICTURE.write_text(draw())
    print(f"{len(package_arrows())} arrows between {sum(map(len, LAYERS))} packages in {len(LAYERS)} layers: {PICTURE}")
