"""The folder list is the architecture: imports point one way, every module is tested."""

import ast
import functools
import graphlib
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import jaxprune

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "jaxprune"

# From the bottom up. A room imports from rooms below its own and from itself.
ROOMS = [
    ["core"],
    ["program"],
    ["coupling"],
    ["narrowing"],
    ["statistics"],
    ["surgery"],
    ["costing", "scores"],
    ["select"],
    ["training"],
    ["search"],
    ["display", "io"],
    ["recipes"],
    ["integrations", "data", "models"],
    [""],
    ["cli"],
]
FLAX = {"integrations", "models"}  # nothing else knows a module library


@functools.cache
def _parsed(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


def _dotted(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    _dotted(path).removeprefix("jaxprune").removeprefix("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def _height(module: str) -> int:
    room = module.split(".")[0]
    for height, rooms in enumerate(ROOMS):
        if room in rooms:
            return height
    raise AssertionError(f"jaxprune.{module} stands in no room of ROOMS")


@functools.cache
def _imports(path: pathlib.Path) -> frozenset[str]:
    """Dotted names of the modules that a file imports; not those for types alone."""
    found = set()
    nodes = list(_parsed(path).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.ImportFrom):
            above = ".".join(path.relative_to(ROOT).parts[: -node.level])
            base = ".".join(filter(None, (node.level and above, node.module)))
            for alias in node.names:
                inner = ROOT.joinpath(*base.split("."), alias.name)
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                found.add(f"{base}.{alias.name}" if is_module else base)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return frozenset(found)


def _own(path: pathlib.Path) -> set[str]:
    """The modules of this package that a file imports, without the package's name."""
    found = {name for name in _imports(path) if name.split(".")[0] == "jaxprune"}
    return {name.removeprefix("jaxprune").removeprefix(".") for name in found}


def test_imports_point_down():
    for own, path in MODULES.items():
        assert not {n for n in _imports(path) if n.split(".")[0] == "experiments"}, own
        for target in _own(path):
            if target.split(".")[0] != own.split(".")[0]:
                above = f"jaxprune.{own} imports jaxprune.{target}"
                assert _height(target) < _height(own), above


def test_the_map_is_the_folder_list():
    """CONTRIBUTING's table: every folder, the rooms in the order of imports."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    folders = [name for row in rows for name in re.findall(r"`([\w/]+)`", row)]
    rooms = {face.parent for face in PACKAGE.glob("*/__init__.py")}
    beside = {
        path.parent for ext in ("py", "md", "ipynb") for path in ROOT.glob(f"*/*.{ext}")
    }
    found = rooms | {path for path in beside if path.name[0] != "."} - {PACKAGE}
    assert sorted(folders) == sorted(str(path.relative_to(ROOT)) for path in found)
    heights = [_height(name[9:]) for name in folders if name.startswith("jaxprune/")]
    assert heights == sorted(heights), "a room imports from rooms above it in the table"


def test_the_wheel_holds_the_package_its_types_and_the_licence():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["jaxprune"]}
    assert project["project"]["license-files"] == ["LICENSE"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert (PACKAGE / "py.typed").exists()


def test_the_glossary_names_rooms_and_modules_that_exist():
    text = (ROOT / "docs" / "engine.md").read_text()
    assert all((ROOT / room).is_dir() for room in re.findall(r"`(jaxprune/\w+)`", text))
    assert len(re.findall(r"`(jaxprune/\w+)`", text)) == 3
    names = {path.name for path in MODULES.values()}
    assert set(re.findall(r"`(_\w+\.py)`", text)) <= names


def test_no_room_has_a_circle():
    """Inside rooms too: modules can be read one after the other, from the bottom."""
    graph = {own: _own(path) for own, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, naming the circle


def test_only_integrations_and_models_know_flax():
    for own, path in MODULES.items():
        if own.split(".")[0] not in FLAX:
            assert "flax" not in {name.split(".")[0] for name in _imports(path)}, own


def test_no_public_function_has_the_name_of_a_module_beside_it():
    for face in PACKAGE.rglob("__init__.py"):
        beside = {path.stem for path in face.parent.iterdir()}
        for node in _parsed(face).body:
            if isinstance(node, ast.ImportFrom) and node.module != _dotted(face):
                names = {alias.asname or alias.name for alias in node.names}
                assert not names & beside or node.module == "jaxprune", face


def test_importing_jaxprune_imports_neither_flax_nor_orbax():
    code = (
        "import sys, jaxprune; heavy = {'flax', 'orbax', 'matplotlib', 'tyro', 'jinja2'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules); "
        "[getattr(jaxprune, name) for name in dir(jaxprune)]; "
        "assert jaxprune.__version__"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_module_is_tested():
    tests = " ".join(p.stem for p in (ROOT / "tests").rglob("test_*.py"))
    covered = {
        "core": ["masks", "packing", "positions", "placement", "tables"],
        "program": ["rules"],
        "coupling": ["contract", "rules", "exactness", "solve", "balance"],
        "narrowing": ["narrow", "build"],
        "surgery": ["slicing", "merging", "compose", "compensate"],
        "statistics": ["recalibration", "taps", "moments"],
        "costing": ["costs", "cost_model", "latency"],
        "training": ["bridgeout", "sparse_training", "schedules", "centripetal"],
        "search": ["slimmable", "widths", "try_and_learn"],
        "recipes": ["prune", "plans", "sensitivity"],
        "integrations": ["modules"],
        "io": ["checkpoints", "export", "save_pruned"],
        "display": ["report", "pictures"],
    }
    for room in {own.split(".")[0] for own in MODULES} - {""}:
        for name in covered.get(room, [room]):
            assert f"test_{name}" in tests, f"no tests/test_{name}.py for {room}"


def test_public_names_are_documented():
    for name in jaxprune.__all__:
        thing = getattr(jaxprune, name)
        if callable(thing):
            assert thing.__doc__, name
