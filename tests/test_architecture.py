"""The rules of the layout, held against what the source imports (docs/architecture.md says them in words)."""

import ast
import re
import subprocess
import sys

import pytest
from support.architecture import (
    LAYERS,
    PICTURE,
    ROOT,
    SUBPACKAGES,
    arrows,
    draw,
    files,
    imported,
    is_command,
    layer_of,
    package_of,
)

MODULES = sorted(files())
# The only packages that import a heavy library. `omegaconf` names the type of a configuration above config.
HOMES = {
    "mlflow": {"tracking"},
    "optuna": {"search"},
    "hydra": {"config"},
    "matplotlib": {"report"},
    "horizon_plugin_pytorch": {"plugin"},
    "ray": {"executor"},
    "omegaconf": {"config", "bundle", "study", "commands", "workflows"},
}
TORCH_FREE = ("core", "cost_model", "search", "tracking", "process")
# Beside the standard library; each of these packages is data and rules, or reads it.
ALLOWED = {"core": set(), "process": set(), "cost_model": {"numpy", "scipy"}}
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_COMMAND = 300, 50, 9


def inner(module):
    """The subpackage of a module, or ""."""
    parts = module.split(".")
    return parts[2] if len(parts) > 2 and files().get(".".join(parts[:3]), ROOT).name == "__init__.py" else ""


USERS = [*MODULES, *sorted(f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("*.py"))]


def targets_of(user):
    """Modules of qflow that a module, or a benchmark, imports."""
    if user in files():
        return arrows()[user]
    names = imported(ROOT / f"{user.replace('.', '/')}.py")
    return {n for text in names for n in (text, text.rpartition(".")[0]) if n in files() and n != "qflow"}


def place(layers, name):
    return next(i for i, layer in enumerate(layers) if name in layer)


# ---- 1. files of qflow/, and `__main__`, are commands ----------------------------------------------------------------


def test_a_file_of_qflow_itself_is_a_command_of_a_few_lines():
    """So is `__main__` of a package, where the command has the package's name."""
    loose = [name for name in MODULES if is_command(name)]
    assert loose
    for name in loose:
        command = f"qflow.commands.{name.split('.')[1]}".replace("__main__", "main")  # `python -m qflow`: any command
        assert arrows()[name] == {command, "qflow.process.interrupts"}, name  # Ctrl-C while the command is imported
        assert len(files()[name].read_text().splitlines()) <= LONGEST_COMMAND, name


@pytest.mark.parametrize("user", USERS)
def test_nothing_imports_a_command(user):
    for target in targets_of(user):
        assert not is_command(target), f"{user} imports {target}"
        assert package_of(target) != "commands" or is_command(user), f"{user} imports {target}"


def test_modules_are_imported_by_name_in_five_places_only():
    """`import qflow` finds its names, `tune` its workflow, `qflow <command>` the command, a worker what its
    driver names, and engine=plugin the modules of the plugin in a fixed list; others would escape rules.
    """
    calls = re.compile(r"\b(import_module|__import__)\(")
    assert {name for name in MODULES if calls.search(files()[name].read_text())} == {
        "qflow", "qflow.commands.tune", "qflow.commands.main", "qflow.executor.processes",
        "qflow.plugin.public",
    }  # fmt: skip


# ---- 2. the order ------------------------------------------------------------------------------------------------


def test_every_package_has_its_layer():
    packages = {package_of(name) for name in MODULES} - {""}
    assert packages == {package for layer in LAYERS for package in layer}
    for package in packages - {"workflows"}:
        folders = {path.parent.name for path in (ROOT / "qflow" / package).glob("*/__init__.py")}
        assert folders == {name for layer in SUBPACKAGES.get(package, ()) for name in layer}, package


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    for target in arrows()[name]:
        own, other = package_of(name), package_of(target)
        if not own or target == "qflow":  # a command; names of `qflow` itself: see below
            continue
        if own != other:
            assert layer_of(other) < layer_of(own), f"{name} imports {target}"
        elif inner(name) != inner(target) and own in SUBPACKAGES:
            layers = SUBPACKAGES[own]
            assert inner(target), f"{name} imports {target}, beside its subpackages"
            assert not inner(name) or place(layers, inner(target)) < place(layers, inner(name)), (
                f"{name} imports {target}"
            )


def test_nothing_uses_the_names_of_import_qflow_itself():
    for name in MODULES:
        own = {text for text in imported(files()[name]) if text.startswith("qflow.") and text.count(".") == 1}
        assert all(text in files() for text in own), name


def test_no_files_import_each_other_in_a_circle():
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for target in sorted(arrows()[name]):
                visit(target)
            done.add(path.pop())

    for name in MODULES:
        if name != "qflow":  # imports on first use of a name
            visit(name)


# ---- 3. what a package offers --------------------------------------------------------------------------------------


def offered(package):
    """`__all__` of a package: the modules that others may import."""
    tree = ast.parse(files()[package].read_text())
    (found,) = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"]
    return ast.literal_eval(found)


PACKAGES = [
    name
    for name in MODULES
    if files()[name].name == "__init__.py" and name not in ("qflow", "qflow.commands", "workflows")
]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_it_is_for_and_what_others_may_use(package):
    folder = files()[package].parent
    tree = ast.parse(files()[package].read_text())
    assert ast.get_docstring(tree)
    assert len(tree.body) == 2, "a docstring and __all__: naming what may be used imports nothing"
    for name in offered(package):
        assert (folder / f"{name}.py").exists() or (folder / name / "__init__.py").exists(), name


@pytest.mark.parametrize("user", USERS)
def test_others_use_only_what_a_package_offers(user):
    for target in targets_of(user):
        assert target not in PACKAGES, (
            f"{user} imports the package {target}: import from the file that defines the name"
        )
        require_offered(user, target)


def test_what_import_qflow_gives_is_offered_too():
    for place in re.findall(r'"(qflow(?:\.\w+)+)"', files()["qflow"].read_text()):
        require_offered("qflow", place)


def require_offered(user, target):
    parts = target.split(".")
    for depth in range(2, len(parts)):
        package = ".".join(parts[:depth])
        if package in PACKAGES and not f"{user}.".startswith(f"{package}."):
            assert parts[depth] in offered(package), f"{user} imports {target}, which {package} does not offer"


def test_naming_what_may_be_used_loads_nothing_heavy():
    heavy = ["torch", "mlflow", "optuna", "hydra", "pandas", "numpy"]
    code = f"import sys, qflow, {', '.join(PACKAGES)}; print([n for n in {heavy} if n in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert shown.stdout.strip() == "[]"


# ---- 4. libraries have one home ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_each_heavy_library_has_one_home(name):
    package = package_of(name)
    libraries = {text.split(".")[0] for text in imported(files()[name])} - {"qflow"}
    for library, homes in HOMES.items():
        assert library not in libraries or package in homes, f"{name} imports {library}"
    assert package not in TORCH_FREE or "torch" not in libraries, f"{name} imports torch"
    if package in ALLOWED:
        assert libraries <= set(sys.stdlib_module_names) | ALLOWED[package] | {"__future__"}, (
            f"{name} imports {libraries}"
        )


def reaches(name):
    """Everything that a module imports, and what these import."""
    found, left = set(), [name]
    while left:
        for target in arrows()[left.pop()] - found - {"qflow"}:
            found.add(target)
            left.append(target)
    return found


@pytest.mark.parametrize("package", ["quant", "cost_model", "analysis"])
def test_engine_costs_and_analysis_never_reach_a_store_or_a_configuration(package):
    for name in (n for n in MODULES if package_of(n) == package):
        assert not {package_of(n) for n in reaches(name)} & {"tracking", "search", "config"}, name


# ---- 5. tests mirror the packages; sizes, and the picture ------------------------------------------------------------


SOURCES = sorted(
    path for folder in ("qflow", "workflows", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")
)


def test_tests_lie_under_the_package_that_they_test():
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/*.py")} - {"support", "zoo_real"}
    assert folders == {package for layer in LAYERS for package in layer}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small_or_say_why(path):
    lines = path.read_text().splitlines()
    product = path.parts[len(ROOT.parts)] in ("qflow", "workflows")
    assert len(lines) <= LONGEST_FILE or (not product and any(line.startswith("# Long: ") for line in lines))
    for node in ast.walk(ast.parse("\n".join(lines))):
        if (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            and node.end_lineno - node.lineno >= LONGEST_FUNCTION
        ):
            own = lines[node.lineno : node.end_lineno]
            assert any(line.strip().startswith("# Long: ") for line in own), f"{node.name}, line {node.lineno}"


def test_the_picture_shows_the_imports_as_they_are():
    assert PICTURE.read_text() == draw(), "python tests/support/architecture.py draws it anew"
