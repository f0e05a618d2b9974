"""The rules of the house, read off the source tree: what may import what, how long a file is, what is public."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "pyro_flows"
FILES = sorted(ROOT.rglob("*.py"))
PACKAGES = [path for path in FILES if path.name == "__init__.py"]

# Imports run upward only: a layer may import those before it and itself. `errors` is at the very bottom.
LAYERS = (
    *("errors", "numerics", "univariate", "nets", "transforms", "manifolds", "distributions", "stochastic", "diagnostics"),
    *("flows", "model", "training", "density", "guides", "posterior", "vi", "cli"),
)
WITHOUT_PYRO = ("numerics", "univariate")
MAX_LINES = 320
MAX_FILES = 14  # in a room, its __init__ not counted
CATALOGUES = ("transforms", "manifolds")  # one family a file: they may be as long as they are
# Imported by the functions that need them, never by `import pyro_flows`.
HEAVY = ("arviz", "arviz_base", "h5py", "matplotlib", "pandas", "torch._dynamo", "xarray", "pyro_flows.cli")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str | None:
    """The layer of a module of pyro_flows; None for the top package itself, the public face."""
    parts = module.split(".")
    return None if len(parts) == 1 else "cli" if parts[1] == "__main__" else parts[1]


def imports(source: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    """Line and full dotted name of everything that a source imports, functions' and type-checkers' imports included."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def broken_rules(source: str, module: str, is_package: bool = False) -> list[str]:
    """The import rules that a source breaks, in words."""
    broken = []
    layer = layer_of(module)
    for line, name in imports(source, module, is_package):
        where = f"{module}, line {line}: imports {name}"
        if name.split(".")[0] == "pyro" and layer in WITHOUT_PYRO:
            broken.append(f"{where}, but {layer} knows nothing of Pyro")
        if name.split(".")[0] != "pyro_flows":
            continue
        target = layer_of(name)
        if target == "cli" and layer != "cli":
            broken.append(f"{where}, but nothing imports cli")
        elif layer is None or (layer == "cli" and target == "__version__"):
            continue  # the public face imports every layer
        elif target not in LAYERS:
            broken.append(f"{where} from the public face: import it from the layer that defines it")
        elif LAYERS.index(target) > LAYERS.index(layer):
            broken.append(f"{where}, but {layer} is below {target}")
    return broken


def test_every_module_has_a_layer():
    found = {layer_of(module_name(path)) for path in FILES} - {None}
    assert not found - set(LAYERS), f"not in LAYERS, so without a place in the order of imports: {found - set(LAYERS)}"


def test_imports_run_upward():
    broken = [
        rule
        for path in FILES
        for rule in broken_rules(path.read_text("utf-8"), module_name(path), path.name == "__init__.py")
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    "module, source, says",
    [
        ("pyro_flows.nets.mlp", "from ..guides import AutoFlow", "nets is below guides"),
        ("pyro_flows.nets.mlp", "from .. import guides", "nets is below guides"),
        ("pyro_flows.nets.mlp", "def f():\n    import pyro_flows.flows as flows", "nets is below flows"),
        ("pyro_flows.flows", "from .vi.fit import fit", "flows is below vi"),
        ("pyro_flows.nets.mlp", "from pyro_flows import Flow", "from the public face"),
        ("pyro_flows", "from .cli import main", "nothing imports cli"),
        ("pyro_flows.numerics.roots", "import pyro.ops", "knows nothing of Pyro"),
        ("pyro_flows.nets.mlp", "import torch, pyro\nfrom ..errors import ShapeError\nfrom .masked import MADE", None),
        ("pyro_flows.cli", "from pyro_flows import __version__", None),
    ],
)
def test_the_import_rules_see(module, source, says):
    broken = broken_rules(source, module, is_package=module == "pyro_flows")
    assert (says is None and not broken) or (len(broken) == 1 and says in broken[0])


def graph_of(sources: dict[str, str], packages: set[str]) -> dict[str, set[str]]:
    """Which modules each module imports, type-checkers' and functions' imports included; a name out of a package is that of its module."""

    def module_of(name: str) -> str | None:
        while name and name not in sources:
            name = name.rpartition(".")[0]
        return name or None

    graph = {}
    for module, source in sources.items():
        graph[module] = {module_of(name) for _, name in imports(source, module, module in packages)} - {None, module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules of which each imports, through others, each other one."""

    def reached(start: str) -> set[str]:
        seen, ahead = set(), [start]
        while ahead:
            new = graph[ahead.pop()] - seen
            seen |= new
            ahead += new
        return seen

    reach = {module: reached(module) for module in graph}
    groups = {frozenset(other for other in reach[module] if module in reach[other]) for module in graph}
    return sorted(sorted(group) for group in groups if group)


def test_no_module_imports_itself_through_others():
    graph = graph_of({module_name(path): path.read_text("utf-8") for path in FILES}, {module_name(path) for path in PACKAGES})
    assert not circles(graph), "these import one another: " + "; ".join(map(", ".join, circles(graph)))


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ("from .b import f", "import torch", False),
        ("from .b import f", "from .a import g", True),
        ("from . import b", "import pyro_flows.nets.a", True),
        ("from .b import f", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import g", True),
        ("from .b import f", "def g():\n    from pyro_flows.nets.a import h", True),
        ("from .b import f", "from . import f", True),  # through the room's own __init__
        ("from ..errors import ShapeError", "from ..errors import ShapeError", False),
    ],
)
def test_circles_are_seen(first, second, expected):
    packages = {"pyro_flows", "pyro_flows.nets"}
    sources = {"pyro_flows": "", "pyro_flows.errors": "", "pyro_flows.nets": "from .a import f\nfrom .b import f", "pyro_flows.nets.a": first}
    graph = graph_of(sources | {"pyro_flows.nets.b": second}, packages)
    assert [{"pyro_flows.nets.b"} <= set(group) for group in circles(graph)] == [True] * expected


def test_rooms_are_small():
    rooms = {path.parent.relative_to(ROOT): len(list(path.parent.glob("*.py"))) - 1 for path in PACKAGES}
    large = [f"{room}/: {count} files, at most {MAX_FILES}: make two rooms" for room, count in rooms.items() if count > MAX_FILES]
    large = [line for line in large if not line.startswith(tuple(f"{room}/" for room in CATALOGUES))]
    assert not large, "\n".join(large)


def test_files_are_short():
    lines = {module_name(path): len(path.read_text("utf-8").splitlines()) for path in FILES}
    long = [f"{name}: {count} lines, at most {MAX_LINES}" for name, count in lines.items() if count > MAX_LINES]
    assert not long, "\n".join(long)


def has_own_docstring(value) -> bool:
    """Constants need none; a class's is its own, neither its base's nor the signature that dataclass writes."""
    if inspect.isclass(value):
        doc = vars(value).get("__doc__") or ""
        return bool(doc) and not doc.startswith(f"{value.__name__}(")
    if inspect.isroutine(value) or inspect.ismodule(value):
        return bool(value.__doc__)
    return True


@pytest.mark.parametrize("name", [module_name(path) for path in PACKAGES])
def test_public_names_exist_and_are_documented(name):
    package = importlib.import_module(name)
    assert package.__doc__, f"{name} has no docstring"
    assert hasattr(package, "__all__"), f"{name} does not say what is public: no __all__"
    assert len(set(package.__all__)) == len(package.__all__), f"{name}.__all__ names something twice"
    missing = [public for public in package.__all__ if not hasattr(package, public)]
    assert not missing, f"{name}.__all__ names what does not exist: {missing}"
    bare = [public for public in package.__all__ if not has_own_docstring(getattr(package, public))]
    assert not bare, f"{name}: without a docstring: {bare}"


def test_import_is_light():
    code = f"import sys, pyro_flows; print(*(name for name in {HEAVY} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert not run.stdout.split(), f"`import pyro_flows` imports {run.stdout.strip()}: import it where it is used"
