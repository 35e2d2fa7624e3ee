"""The folder list is the architecture: imports point one way, every module is tested."""

import ast
import pathlib

import pytest

import jaxprune

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "jaxprune"
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up. A module may import from its own layer's package and from below.
LAYERS = [
    ["placement", "positions", "coupling.groups", "coupling.jaxprs"],
    ["masks"],
    ["coupling", "packing", "schedules", "thresholds"],
    ["taps"],
    ["slicing", "scores", "costs", "data", "models", "checkpoints"],
    ["select"],
    ["clusters"],
    ["optimizers"],
    [
        "export",
        "plans",
        "modules",
        "pictures",
        "noisy_layers",
        "recalibration",
        "merging",
    ],
    ["pruning", "latency", "sensitivity"],
    [""],
    ["report"],
    ["cli"],
]


def _name(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _layer(module: str) -> int:
    parts = module.split(".")
    for stop in range(len(parts), -1, -1):
        room = ".".join(parts[:stop])
        for height, rooms in enumerate(LAYERS):
            if room in rooms and (room or not module):
                return height
    raise AssertionError(f"jaxprune.{module} stands in no layer of LAYERS")


def _imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            base = node.module
            for alias in node.names:
                inner = ROOT.joinpath(*base.split("."), alias.name)
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                found.add(f"{base}.{alias.name}" if is_module else base)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_point_down(path):
    own = _name(path)
    room = own.split(".")[0]
    for imported in _imports(path):
        assert imported.split(".")[0] != "experiments", f"{own} imports {imported}"
        if imported.split(".")[0] != "jaxprune":
            continue
        target = imported.removeprefix("jaxprune").removeprefix(".")
        if target.split(".")[0] == room:
            continue
        assert _layer(target) < _layer(own), f"jaxprune.{own} imports jaxprune.{target}"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_only_models_know_flax(path):
    if {"models", "modules"} & set(path.parts):
        return
    imported = {name.split(".")[0] for name in _imports(path)}
    assert "flax" not in imported


def test_every_module_is_tested():
    tests = " ".join(p.stem for p in (ROOT / "tests").rglob("test_*.py"))
    rooms = {_name(p).split(".")[0] for p in MODULES} - {"", "coupling"}
    covered = {
        "optimizers": ["bridgeout"],
        "coupling": ["contract", "rules", "narrow", "exactness"],
        "pruning": ["prune"],
        "checkpoints": ["checkpoints"],
    }
    for room in rooms:
        for name in covered.get(room, [room]):
            assert f"test_{name}" in tests, f"no tests/test_{name}.py for {room}"


def test_public_names_are_documented():
    for name in dir(jaxprune):
        thing = getattr(jaxprune, name)
        if not name.startswith("_") and callable(thing):
            assert thing.__doc__, name
