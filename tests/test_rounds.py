"""Rounds: what they do against a loop by hand, and kills at any moment."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune

pytestmark = pytest.mark.once

X = jnp.ones((2, 4))
TX = optax.sgd(0.05, momentum=0.9)


def net(variables, x):
    hidden = jax.nn.relu(x @ variables["params"]["a"])
    return jax.nn.relu(hidden @ variables["params"]["b"]) @ variables["params"]["c"]


def loss_fn(variables, batch):
    return jnp.mean((net(variables, batch[0]) - batch[1]) ** 2)


def variables():
    shapes = {"a": (4, 8), "b": (8, 6), "c": (6, 2)}
    keys = jax.random.split(jax.random.key(1), 3)
    made = {
        n: jax.random.normal(k, s)
        for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }
    return {"params": made}


DATA = [(x, x[:, :2]) for x in jax.random.normal(jax.random.key(2), (5, 16, 4))]


def evaluate(apply_fn, found):
    return -jnp.mean((apply_fn(found, DATA[0][0]) - DATA[0][1]) ** 2)


def run(**options):
    options = {"steps": 6, "rounds": 3, "sparsity": 0.5, **options}
    return jaxprune.rounds(
        net,
        variables(),
        X,
        tx=TX,
        data=DATA,
        **{"evaluate": evaluate, "loss_fn": loss_fn, **options},
    )


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def by_hand(sparsities, steps):
    """The same by the pieces, written down one after the other."""
    full = variables()
    groups = jaxprune.trace(net, full, X)
    state, opt_state = full, TX.init(full["params"])
    masks, count, keep = None, 0, {}
    for sparsity in [None, *sparsities]:
        if sparsity is not None:
            left = net if masks is None else jaxprune.narrow(net, masks)
            found = jaxprune.trace(left, state, X)
            scores = jaxprune.group_scores(found, state)
            for name, group in groups.items():
                kept = keep.get(name, np.ones(group.size, bool)).copy()
                wanted = round(sparsity * group.size) - int((~kept).sum())
                alive = np.flatnonzero(kept)
                kept[
                    alive[np.argsort(np.asarray(scores[name]), kind="stable")[:wanted]]
                ] = False
                keep[name] = kept
            new = jaxprune.expand_masks(groups, keep)
            further = new if masks is None else jaxprune.slice_params(new, masks)
            state = jaxprune.slice_params(state, further)
            opt_state = jaxprune.slice_opt_state(TX, opt_state, further["params"])
            masks = new
        loss = loss_fn if masks is None else jaxprune.narrow(loss_fn, masks)

        @jax.jit
        def step(state, opt_state, batch, loss=loss):
            slopes = jax.grad(lambda p: loss({"params": p}, batch))(state["params"])
            updates, opt_state = TX.update(slopes, opt_state, state["params"])
            return {"params": optax.apply_updates(state["params"], updates)}, opt_state

        for _ in range(steps):
            state, opt_state = step(state, opt_state, DATA[count % len(DATA)])
            count += 1
    return masks, state


def test_rounds_are_the_loop_by_hand():
    found = (
        run(sparsity=[0.25, 0.5]) if False else run(sparsity=[0.25, 0.5], rounds=None)
    )
    masks, state = by_hand([0.25, 0.5], 6)
    same(found.last.masks, masks)
    for x, y in zip(
        jax.tree.leaves(found.last.variables), jax.tree.leaves(state), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert [entry.steps for entry in found.history] == [6, 6, 6]
    assert found.history[0].kept == 1.0 and found.history[0].parameters == 92
    np.testing.assert_allclose(
        found.history[-1].metric,
        evaluate(found.last.apply_fn, found.last.variables),
        rtol=1e-6,
    )


def test_schedules():
    geometric = [entry.kept for entry in run(sparsity=0.75, rounds=2, steps=0).history]
    assert geometric == [1.0, pytest.approx(0.5), pytest.approx(0.25, abs=0.04)]
    linear = run(sparsity=0.5, rounds=2, steps=0, schedule="linear")
    assert [entry.kept for entry in linear.history] == [
        1.0,
        pytest.approx(0.75, abs=0.04),
        0.5,
    ]
    flops = [
        entry.flops
        for entry in run(sparsity=None, budget=0.25, rounds=2, steps=0).history
    ]
    assert flops[1] <= 0.5 * flops[0] and flops[2] <= 0.25 * flops[0]
    each = run(sparsity=None, budget=[0.8, 0.3], rounds=None, steps=0).history
    assert each[1].flops <= 0.8 * flops[0] and each[2].flops <= 0.3 * flops[0]


def test_rewinding_goes_back_to_the_first_weights():
    found = run(steps=[6, 0, 0, 0], rewind=0)
    same(found.last.variables, jaxprune.slice_params(variables(), found.last.masks))
    later = run(steps=[6, 0, 0, 0], rewind=2)
    two = run(steps=[2, 0, 0, 0]).load(0).variables
    same(later.last.variables, jaxprune.slice_params(two, later.last.masks))


def test_scores_counted_once():
    calls = []

    def score(found):
        calls.append(1)
        return found

    run(steps=0, score=score, rescore=False)
    assert len(calls) == 1
    run(steps=0, score=score)
    assert len(calls) == 4


def test_a_step_of_ones_own():
    def step(apply_fn, state, batch):
        def loss(params):
            return jnp.mean((apply_fn({"params": params}, batch[0]) - batch[1]) ** 2)

        slopes = jax.grad(loss)(state.variables["params"])
        updates, opt_state = TX.update(
            slopes, state.opt_state, state.variables["params"]
        )
        params = optax.apply_updates(state.variables["params"], updates)
        return state._replace(
            variables={"params": params}, opt_state=opt_state, step=state.step + 1
        )

    for x, y in zip(
        jax.tree.leaves(run(step=step).last.variables),
        jax.tree.leaves(run().last.variables),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_the_best_round_and_the_smallest_that_is_good_enough():
    metrics = iter([0.9, 0.95, 0.88, 0.5])
    found = jaxprune.rounds(
        net,
        variables(),
        X,
        tx=TX,
        data=DATA,
        steps=0,
        rounds=3,
        sparsity=0.5,
        loss_fn=loss_fn,
        evaluate=lambda apply_fn, variables: next(metrics),
    )
    same(found.best.masks, found.load(1).masks)
    same(found.within(0.03).masks, found.load(2).masks)
    unknown = run(steps=0, evaluate=None)
    with pytest.raises(ValueError, match="have no metric"):
        unknown.choose(0.0)


def test_the_loss_as_the_metric():
    found = run(steps=1, rounds=1, evaluate="loss")
    for entry in found.history:
        small = found.load(entry.round)
        losses = [
            jnp.mean((small.apply_fn(small.variables, x) - y) ** 2) for x, y in DATA
        ]
        np.testing.assert_allclose(entry.metric, -np.mean(losses), rtol=1e-5)
    with pytest.raises(ValueError, match=r"must be a function .* or 'loss', got 'acc'"):
        run(evaluate="acc")
    with pytest.raises(ValueError, match="needs loss_fn= and batches="):
        run(evaluate="loss", loss_fn=None, step=lambda fn, state, batch: state)


def test_a_run_that_is_done_is_read_back(tmp_path):
    first = run(folder=tmp_path)
    again = run(folder=tmp_path)
    assert again.history == first.history
    same(again.last.variables, first.last.variables)
    same(again.load(1).variables, first.load(1).variables)
    with pytest.raises(
        ValueError, match=r"holds a run with targets=.*take another folder"
    ):
        run(folder=tmp_path, sparsity=0.6)
    with pytest.raises(ValueError, match="there is no round 7"):
        first.load(7)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"rounds": None}, ValueError, "rounds must be at least 1"),
        (
            {"sparsity": [0.1, 0.2]},
            ValueError,
            "rounds=3, but sparsity has a number for 2",
        ),
        ({"steps": [1, 2]}, ValueError, "steps must be one number or 4"),
        ({"schedule": "cubic"}, ValueError, "'geometric' or 'linear'"),
        ({"rewind": 6}, ValueError, "rewind=6 is not a step of round 0, which has 6"),
        ({"scor": "l1"}, TypeError, "rounds has no option 'scor'; did you mean score"),
    ],
)
def test_mistakes_are_told(options, error, text):
    with pytest.raises(error, match=text):
        run(**options)


def _child(folder):
    return subprocess.Popen(
        [sys.executable, __file__, str(folder)],
        cwd=pathlib.Path(__file__).parent.parent,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent.parent)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    """Killed in another process at an early and a late moment, and ended in this one."""
    expected = run(save_every=2, rewind=2, rescore=False)
    for moment in (1, 8):
        child = _child(tmp_path)
        while child.poll() is None:
            names = {path.name for path in tmp_path.glob("steps/*")}
            newest = max((int(name) for name in names if name.isdigit()), default=0)
            if newest >= moment:
                child.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        assert child.wait() == -signal.SIGKILL
    resumed = run(folder=tmp_path, save_every=2, rewind=2, rescore=False)
    assert [entry.metric for entry in resumed.history] == [
        entry.metric for entry in expected.history
    ]
    same(resumed.last.variables, expected.last.variables)
    same(resumed.load(2).variables, expected.load(2).variables)


if __name__ == "__main__":
    run(folder=sys.argv[1], save_every=2, rewind=2, rescore=False)
