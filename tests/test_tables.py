"""How groups print: every name and number is there, whatever is folded."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.core._groups import Group, Groups, Member, Pinned, Reason

pytestmark = pytest.mark.once


def expand(pattern):
    """``a{0..2,5}`` -> {a0, a1, a2, a5}, as a shell does."""
    choices = []
    for part in re.split(r"(\{[^}]*\})", pattern):
        if not part.startswith("{"):
            choices.append([part])
            continue
        numbers = []
        for run in part[1:-1].split(","):
            first, _, last = run.partition("..")
            numbers += range(int(first), int(last or first) + 1)
        choices.append([str(number) for number in numbers])
    return {"".join(choice) for choice in itertools.product(*choices)}


def group(name, size, members, **facts):
    parts = [m.rsplit(":", 1) for m in members]
    index = np.arange(size)[:, None]
    return Group(name, size, tuple(Member(p, int(a), index) for p, a in parts), **facts)


def groups_of(*found, pinned=()):
    return Groups({g.name: g for g in found}, pinned, {}, jax.tree.structure({}))


def blocks(numbers):
    """A stream through all blocks, and a hidden layer in each."""
    inside = [
        group(
            f"params/block{n}/up/kernel:1",
            12,
            [f"params/block{n}/up/kernel:1", f"params/block{n}/down/kernel:0"],
        )
        for n in numbers
    ]
    stream = [f"params/block{n}/{leaf}" for n in numbers for leaf in ("up/kernel:0",)]
    return groups_of(group("params/embed:1", 5, ["params/embed:1", *stream]), *inside)


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3], [1, 3, 4, 7], [9, 10, 11], [5]])
def test_folded_names_are_exactly_the_names(numbers):
    groups = blocks(numbers)
    text = repr(groups)
    names = re.findall(r"params/\S+", text)
    assert set.union(*map(expand, names)) == set(groups)
    assert re.search(
        rf"\b{len(numbers)} x 12\b" if len(numbers) > 1 else r"\b12\b", text
    )
    (stream,) = re.findall(r"(\S*block\S*/up)  kernel:0", text)
    assert expand(stream) == {f"block{n}/up" for n in numbers}
    assert f"{len(groups)} groups, {5 + 12 * len(numbers)} units" in text


def test_groups_that_differ_in_more_than_a_number_stay_apart():
    def pair(size_of_second, member_of_second, **facts):
        return groups_of(
            group("params/a0/w:1", 4, ["params/a0/w:1", "params/b0/w:0"]),
            group(
                "params/a1/w:1",
                size_of_second,
                ["params/a1/w:1", member_of_second],
                **facts,
            ),
        )

    def rows(groups):
        return set(re.findall(r"params/\S+", repr(groups)))

    apart = {"params/a0/w:1", "params/a1/w:1"}
    assert rows(pair(4, "params/b0/w:0")) == {"params/a{0,1}/w:1"}
    assert rows(pair(5, "params/b0/w:0")) == apart
    assert rows(pair(4, "params/b1/w:0")) == apart
    assert (
        rows(pair(4, "params/b0/w:0", exact=False, reason=Reason("sum", "a mean")))
        == apart
    )


def test_what_is_not_exact_says_why():
    def gate(params, x):
        hidden = jax.nn.relu(x @ params["up"]["w"] + params["up"]["b"][None])
        table = jnp.arange(4.0)[None]
        return jax.nn.softmax(hidden @ params["gate"]["w"] + table) @ params["out"]["w"]

    sizes = {
        "up": {"w": (3, 8), "b": (8,)},
        "gate": {"w": (8, 4)},
        "out": {"w": (4, 2)},
    }
    params = jax.tree.map(jnp.ones, sizes, is_leaf=lambda x: isinstance(x, tuple))
    text = repr(jaxprune.trace(gate, params, jnp.ones((1, 3))))
    assert "2 groups, 12 units; 1 exact" in text
    assert re.search(r"up\s+w:1, b:0", text)
    assert re.search(r"not exact: a maximum\s+over[\s\S]*test_tables.py", text)


def test_repeats_and_order_are_shown():
    index = np.arange(12).reshape(3, 4)
    member = Member("params/dense/kernel", 0, index)
    text = repr(groups_of(Group("params/dense/kernel:0", 3, (member,), ordered=True)))
    assert "kernel:0 x4" in text
    assert "may be pruned but not permuted" in text


def test_pinned_axes_are_a_table_of_reasons():
    pinned = (
        Pinned(
            "params/conv0/kernel",
            0,
            3,
            Reason("window", "the window", "conv", "net.py:3 (f)"),
        ),
        Pinned(
            "params/conv1/kernel",
            0,
            3,
            Reason("window", "the window", "conv", "net.py:9 (f)"),
        ),
        Pinned("params/head/kernel", 1, 2, Reason("output", "coupled to the output")),
    )
    groups = groups_of(group("params/conv0/kernel:3", 4, []), pinned=pinned)
    assert groups.pinned == pinned
    assert "3 axes of 3 leaves pinned" in repr(groups)
    assert "print(groups.pinned)" in repr(groups)
    text = repr(groups.pinned)
    assert re.search(r"2 +the window \(conv at net.py:3 \(f\) and 1 more place", text)
    assert re.search(r"conv\{0,1\} +kernel:0", text)
    assert re.search(r"1 +coupled to the output\n +head +kernel:1", text)


@pytest.mark.parametrize("width", [60, 80, 160])
def test_lines_fit_the_terminal(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    long = "params/" + "/".join(["a_rather_long_name"] * 4) + "/kernel:1"
    groups = groups_of(group(long, 3, [long]), group("params/w:0", 2, ["params/w:0"]))
    lines = repr(groups).splitlines()
    assert max(map(len, lines)) <= width
    assert long.replace("/", "") in re.sub(r"[\s/─]", "", repr(groups))


def test_leaves_without_a_layer_and_states_of_nnx():
    groups = groups_of(
        group("w1:1", 4, ["w1:1", "w2:0"]),
        group("0/kernel/value:1", 3, ["0/kernel/value:1", "1/kernel/value:0"]),
    )
    text = repr(groups)
    assert re.search(r"4 +w1:1  w1 hidden\n +w1:1\n +w2:0", text)
    assert re.search(r"\n +0 +kernel/value:1\n +1 +kernel/value:0", text)


def test_nothing_to_cut_prints():
    assert "0 groups, 0 units" in repr(groups_of())
