"""Every reason that the engine gives has a text, and every text has a use."""

import ast
import pathlib
import pickle

import jax.numpy as jnp

import jaxprune
from jaxprune.core import Reason
from jaxprune.coupling._reasons import TEXTS
from jaxprune.program.primitives import DECLARATIONS

ENGINE = pathlib.Path(jaxprune.__file__).parent
GIVERS = {
    "reduced",
    "_over_dimensions",
    "reason",
    "refuse",
    "sum_over",
    "contract",
    "Reason",
    "text_of",
}


def _words(node):
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}


def _given():
    """The string arguments of every call that gives a reason; assigned ones too."""
    for path in (*ENGINE.glob("co*/**/*.py"), *ENGINE.glob("narrowing/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in GIVERS:
                    yield from (w for arg in node.args for w in _words(arg))
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                yield node.value.value


def test_every_kind_has_a_text_and_every_text_a_use():
    declared = {k for d in DECLARATIONS.values() for k in (d.pinned, d.made)}
    assert declared <= TEXTS.keys()
    kinds = declared | {word for word in _given() if isinstance(word, str)}
    unused = TEXTS.keys() - kinds
    assert not unused


def test_reasons_are_data():
    def net(params, x):
        hidden = jnp.sort(x @ params["a"])
        return hidden @ params["b"]

    params = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}
    pins = {
        (p.path, p.axis): p.reason
        for p in jaxprune.trace(net, params, jnp.ones((1, 3))).pinned
    }
    found = pins["a", 1]
    assert (found.kind, found.primitive) == ("sorted", "sort")
    assert found.source.startswith("test_reasons.py:")
    assert str(found) == f"{TEXTS['sorted']} (sort at {found.source})"
    assert pins["a", 0].kind == "input"
    assert pins["b", 1] == Reason("output", "coupled to the output of apply_fn")
    assert pickle.loads(pickle.dumps(found)) == found
