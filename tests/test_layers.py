"""Layers go strictly down, and each heavy library has one home. The source is walked, not trusted."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [p for folder in ("qflow", "workflows") for p in (ROOT / folder).rglob("*.py")]
# What a package may import of qflow beside itself.
BELOW = {
    "core": set(),
    "quant": {"core"},
    "cost": {"core"},
    "tasks": {"core"},
    "analysis": {"core", "quant"},
    "search": {"core"},
    "tracking": {"core", "search"},
    "report": {"core", "analysis", "cost", "trial"},
}
HOMES = {
    "mlflow": {"tracking"},
    "optuna": {"search"},
    "hydra": {"config"},
    "matplotlib": {"report"},
    "plotly": {"report"},
    "omegaconf": {
        "config",
        "session",
        "fingerprint",
        "trial_outcome",
        "tune",
        "promote",
        "check",
        "analyze",
        "door",
        "workflows",
    },  # the others name the type DictConfig only
}
TORCH_FREE = ("core", "cost", "search", "tracking")


def part_of(path):
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "workflows":
        return "workflows"
    if relative.name == "__main__.py":  # a package that is a door too: python -m qflow.cost
        return "door"
    return relative.parts[1].removesuffix(".py")


def imports(path):
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    part = part_of(path)
    for name in imports(path):
        words = name.split(".")
        if words[0] == "qflow" and len(words) > 1 and part in BELOW and words[1] != "__version__":
            assert words[1] in BELOW[part] | {part}, f"{path.name} imports {name}"
        for library, homes in HOMES.items():
            if words[0] == library:
                assert part in homes, f"{path.name} imports {name}"
        if part in TORCH_FREE:
            assert words[0] != "torch", f"{path.name} imports torch"
        if part == "core":
            assert words[0] not in ("numpy", "pandas", "yaml"), f"{path.name} imports {name}"


def test_nothing_imports_workflows_but_by_name():
    for path in FILES:
        if part_of(path) != "workflows":
            assert not any("workflows" in name for name in imports(path)), path
