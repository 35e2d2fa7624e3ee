"""The tables of the benchmarks, and a benchmark end to end on a tiny net."""

import json
import sys

import jax
import pytest

import jaxprune
from benchmarks import (
    coupling,
    decoders,
    house,
    machine,
    nets,
    nnx_nets,
    reconstruction,
    slimmable,
    tables,
)
from benchmarks.machine import Seconds
from benchmarks.torch_process import TorchPruning

pytestmark = pytest.mark.once


def decoder(layers):
    return nets.decoder_net(decoders.Llama(layers, 8, 4, 2, 2, 6, 10), 3)


@pytest.fixture(scope="module")
def measured():
    """A result of `benchmarks.coupling` on a net and a sweep of tiny decoders."""
    torch, net = TorchPruning(None), decoder(2)
    # Benchmarks run as users do, with JAX's own promotion rules.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        later = coupling.later_calls("tiny", net, torch, 2, [])
        row = {**coupling.jaxpr_and_trace(net, 2), "first": later, "later": later}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coupling, "SWEEPS", {"decoder": (decoder, (1, 2, 4))})
            sweep = coupling.sweep("decoder", torch, 1, most=2)
    return {
        "origin": machine.origin(),
        "nets": {"tiny": row},
        "sweeps": {"decoder": sweep},
    }


def test_a_benchmark_measures_every_part_and_depth(measured):
    row = measured["nets"]["tiny"]
    whole, found = row["later"]["whole_way"]["wall"], row["later"]["parts"]
    assert set(found) == set(coupling.PARTS)
    assert 0 < sum(part["wall"] for part in found.values()) < 2 * whole + 0.1
    assert list(measured["sweeps"]["decoder"]["depths"]) == [1, 2]
    assert "torch_pruning" not in row["later"]


def test_the_tables_show_the_numbers(measured):
    (row,) = tables.net_rows(measured)
    trace = measured["nets"]["tiny"]["trace"]["wall"]
    assert (row[0], float(row[2]), row[5]) == ("tiny", round(trace, 3), "-")
    assert [row[0] for row in tables.sweep_rows(measured)] == ["decoder 1", "decoder 2"]
    text = tables.markdown(tables.NETS_HEAD, [row])
    assert len({len(line) for line in text.split("\n")}) == 1


def test_first_calls_run_in_processes_of_their_own(monkeypatch):
    asked = []

    def answer(*arguments):
        asked.append(arguments)
        return {part: {"wall": 1.0, "cpu": 0.5} for part in coupling.PARTS}

    monkeypatch.setattr(coupling, "_in_a_process", answer)
    found = coupling.first_calls("gpt2_small", None, 3)
    assert asked == [("--first", "gpt2_small")] * 3
    assert found["whole_way"]["wall"] == len(coupling.PARTS)


def test_growth_is_an_exponent():
    assert coupling.exponent([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0]) == 2.0
    summary = machine.summary([Seconds(3, 1), Seconds(1, 1), Seconds(2, 2)])
    assert (summary["wall"], summary["spread"]) == (2, 1)


def test_the_giant_has_seventy_billion_parameters():
    net = nets.decoder_net(decoders.Llama(), 4096)
    assert net.parameters == 70_553_706_496
    leaves = jax.tree.leaves(net.variables)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


TWINS = [f"{name}_nnx" for name in nnx_nets.NNX_NETS] + ["gpt2_small_jax"]


@pytest.mark.parametrize("twin", TWINS)
def test_a_net_written_again_is_the_net_in_linen(twin):
    name = coupling.torch_name(twin)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        linen, other = nets.NETS[name](), nets.NETS[twin]()
        groups = [
            jaxprune.trace(n.make(), n.variables, *n.args) for n in (linen, other)
        ]
    sizes, others = (sorted(g.size for g in each.values()) for each in groups)
    assert sizes == others and len(sizes) > 20
    assert linen.parameters == other.parameters
    assert coupling.torch_name(name) == name != twin


def test_what_torch_lacks_is_said():
    assert TorchPruning("no-such-python").missing.startswith("no-such-python: No such")
    there = TorchPruning(sys.executable)
    assert there.versions is None and "cannot import torch" in there.missing
    assert there.measure("vit", [12]) is None


def test_the_document_shows_the_committed_results():
    document = tables.DOCUMENT.read_text()
    assert tables.filled(document, tables.committed()) == document
    for name in ("coupling", "narrow"):
        origin = tables.load(name)["origin"]
        assert origin["command"].startswith(f"python -m benchmarks.{name}")
        assert origin["versions"]["jax"] and origin["processor"]
        assert "/" not in json.dumps(origin["command"])


def test_the_house_is_measured():
    """Two toy modules that import each other, counted by hand."""
    one = """from typing import Any
from toy import _two

def public(x: Any) -> Any:
    \"\"\"Documented.\"\"\"
    for _ in x:
        if x:  # a comment
            return x

def other(): return _two
"""
    found = house.measure(
        {
            "toy/one.py": one,
            "toy/_two.py": "from toy.one import other\nTree = Any\nleaf: Tree\n",
        }
    )
    assert (found.files, found.lines, found.circles) == (2, 13, 1)
    assert (found.function, found.nesting) == ((2, 4, 4), 2)
    assert (found.documented, found.private) == (0.5, 0.5)
    assert (found.comments, found.any_per_kilo) == (1 / 13, 3000 / 13)
    assert found.any_by_any_name == 4000 / 13


def test_the_benchmark_of_widths_compares_what_is_equal():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = slimmable.measure(4, 8, 1, (4, "M", 8))
    assert set(found["against built by hand"]) == {"1.0", "0.75", "0.5"}
    assert found["FLOPs ratio"]["1.0"] == 1.0 < found["FLOPs ratio"]["0.5"]
    assert found["joint step"]["against the sum"]["cpu"] > 0
    assert found["buckets"]["speed-up"]["wall"] > 0


def test_layers_are_counted_as_often_as_they_occur():
    rows = {
        "one": {"times": 3, **reconstruction.convolution(4, 9, 5)},
        "two": {"times": 1, **reconstruction.convolution(6, 1, 2)},
    }
    found = reconstruction.totals(rows)
    assert set(found) == {"rank", "fit", "rank cpu", "fit cpu"}
    expected = 3 * rows["one"]["rank"] + rows["two"]["rank"]
    assert found["rank"] == round(expected, 1)
    assert {"half", "2:4"} < set(reconstruction.surgeon(8, 4))
    seconds = {
        k: 1.0
        for row in tables.LAYERS.values()
        for k in (*row, *(f"{n} cpu" for n in row))
    }
    result = {name: {"seconds": seconds} for name in tables.LAYERS}
    assert len(list(tables.layer_rows(result))) == 4
    document = tables.filled(f"a\n\n{tables.BEFORE}\n", {"layers": "new"})
    assert (
        document.index("linear algebra")
        < document.index("new")
        < document.index(tables.BEFORE)
    )
    matrices = sum(reconstruction.CONVOLUTIONS.values())
    assert matrices == 52  # with the stem, which reads the image, a ResNet-50 has 53
