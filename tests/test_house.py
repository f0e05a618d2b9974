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
MAX_FILES = 14  # in a room, its __init__.py aside
CATALOGUES = ("transforms", "manifolds")  # of which a reader takes one file at a time
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


def graph(sources: dict[str, tuple[str, bool]]) -> dict[str, set[str]]:
    """Which modules each module imports, among those given as name -> (source, whether it is a package)."""
    edges = {}
    for module, (source, is_package) in sources.items():
        targets = {name if name in sources else name.rpartition(".")[0] for _, name in imports(source, module, is_package)}
        edges[module] = (targets & sources.keys()) - {module}
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The modules that reach themselves through others, grouped with those that they reach and that reach them."""
    reach = {module: set(targets) for module, targets in edges.items()}
    for middle in edges:
        for targets in reach.values():
            if middle in targets:
                targets |= reach[middle]
    groups = {frozenset({m, *(n for n in reach[m] if m in reach[n])}) for m in edges if m in reach[m]}
    return sorted(sorted(group) for group in groups)


def test_no_file_imports_another_in_a_circle():
    """Not even for types, and not within a function: data below, verbs above."""
    found = circles(graph({module_name(path): (path.read_text("utf-8"), path.name == "__init__.py") for path in FILES}))
    assert not found, "\n".join(" <-> ".join(group) for group in found)


@pytest.mark.parametrize("how", ["{}", "if TYPE_CHECKING:\n    {}", "def f():\n    {}"])
def test_the_rule_on_circles_sees(how):
    sources = {
        "p": ("from .a import A", True),
        "p.a": (how.format("from .b import B"), False),
        "p.b": (how.format("from . import c"), False),
        "p.c": (how.format("from .a import A"), False),
        "p.d": ("from .a import A", False),
    }
    assert circles(graph(sources)) == [["p.a", "p.b", "p.c"]]
    sources["p.c"] = ("import torch", False)
    assert not circles(graph(sources))


def test_rooms_are_small():
    rooms = {path.parent for path in FILES if path.parent != ROOT}
    sizes = {room.name: sum(1 for path in room.glob("*.py") if path.name != "__init__.py") for room in rooms}
    large = {name: size for name, size in sizes.items() if size > MAX_FILES and name not in CATALOGUES}
    assert not large, f"more than {MAX_FILES} files, so two rooms: {large}"


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
