"""Sixteen tasks as a person has them, each in at most five lines of code."""

import ast
import importlib.util
import inspect
import subprocess
import sys
import textwrap

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune
from jaxprune import training
from jaxprune.integrations import equinox as for_equinox
from jaxprune.integrations import haiku as for_haiku
from jaxprune.integrations import nnx as for_nnx

pytestmark = pytest.mark.once


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x)).mean((1, 2))
        return nn.Dense(4, name="head")(nn.relu(nn.Dense(12, name="hidden")(x)))


X = jax.random.normal(jax.random.key(0), (8, 6, 6, 3))
LABELS = jnp.arange(8) % 4
BATCHES = [(X, LABELS), (X + 1, LABELS)]
NET = Net()
VARIABLES = NET.init(jax.random.key(1), X)
TX = optax.adam(1e-2)


def loss_fn(variables, batch):
    logits = NET.apply(variables, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        for k in range(2):
            x = x + nn.MultiHeadDotProductAttention(4, name=f"encoder_{k}_attention")(x)
            y = nn.relu(nn.Dense(32, name=f"encoder_{k}_up")(x))
            x = x + nn.Dense(16, name=f"encoder_{k}_down")(y)
        y = nn.relu(nn.Dense(16, name="decoder_up")(x))
        return nn.Dense(3, name="decoder_down")(y)


TOKENS = jax.random.normal(jax.random.key(2), (2, 5, 16))
TRANSFORMER = Transformer()
WEIGHTS = TRANSFORMER.init(jax.random.key(3), TOKENS)


class Module(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def module_loss(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(
        model(batch[0]), batch[1]
    ).mean()


def relaxed(test):
    """Adam and Haiku mix dtypes, which the other tests forbid."""

    def run(**fixtures):
        with jax.numpy_dtype_promotion("standard"):
            test(**fixtures)

    run.__signature__ = inspect.signature(test)
    run.task = test
    run.__name__ = test.__name__
    return run


# Between the two comments is what a person writes.


@relaxed
def test_half_the_flops_by_taylor_fine_tuned_saved_and_loaded_elsewhere(tmp_path):
    opt_state = TX.init(VARIABLES["params"])
    # code
    pruned = jaxprune.prune(
        NET.apply,
        VARIABLES,
        X,
        budget=0.5,
        score="taylor",
        loss_fn=loss_fn,
        batches=BATCHES,
    )
    opt_state = pruned.slice_opt_state(TX, opt_state)
    tuned = jaxprune.rounds(
        NET.apply,
        VARIABLES,
        X,
        tx=TX,
        data=BATCHES,
        steps=[0, 3],
        budget=[0.5],
        score="taylor",
        loss_fn=loss_fn,
    ).last
    tuned.recalibrate([x for x, _ in BATCHES], train=True).save(tmp_path / "small")
    loaded = jaxprune.load(tmp_path / "small")
    # end
    assert pruned.costs.flops <= 0.5 * pruned.costs_before.flops
    assert jax.tree.map(jnp.shape, opt_state[0].mu) == jax.tree.map(
        jnp.shape, pruned.variables["params"]
    )
    code = f"import jaxprune, numpy as np; print(jaxprune.load({str(tmp_path / 'small')!r})(np.ones((1, 6, 6, 3), 'f')).sum())"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    np.testing.assert_allclose(
        float(out), loaded(jnp.ones((1, 6, 6, 3))).sum(), rtol=1e-5
    )


@relaxed
def test_the_same_in_nnx():
    model = Module(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    # code
    pruned = for_nnx.prune(
        model, X, budget=0.5, score="taylor", loss_fn=module_loss, batches=BATCHES
    )
    small, optimizer = pruned.model, pruned.slice_optimizer(optimizer)
    optimizer.update(small, nnx.grad(module_loss)(small, BATCHES[0]))
    # end
    assert small.conv.out_features == small.head.in_features < 8


@relaxed
def test_the_same_in_equinox():
    model = eqx.nn.MLP(3, 4, 16, 2, key=jax.random.key(0))
    state, x = TX.init(eqx.filter(model, eqx.is_array)), X[:, 0, 0]
    # code
    loss = lambda model, batch: jnp.mean(jax.vmap(model)(batch) ** 2)  # noqa: E731
    pruned = for_equinox.prune(
        model, x, budget=0.5, score="taylor", loss_fn=loss, batches=[x]
    )
    small, state = pruned.model, pruned.slice_opt_state(TX, state)
    # end
    assert small.layers[0].out_features < 16
    np.testing.assert_allclose(jax.vmap(small)(x), pruned(x), rtol=1e-5, atol=1e-6)


@relaxed
def test_heads_and_mlp_of_a_transformer_to_a_budget():
    # code
    pruned = jaxprune.prune(
        TRANSFORMER.apply, WEIGHTS, TOKENS, budget=0.6, max_sparsity=0.5
    )
    # end
    assert pruned.costs.flops <= 0.6 * pruned.costs_before.flops
    for name, kept in pruned.plan.items():
        assert kept.mean() >= 0.5, name  # no head and no layer is all but gone


@relaxed
def test_a_latency_budget():
    # code
    table = jaxprune.latency_table(
        TRANSFORMER.apply, WEIGHTS, TOKENS, shares=[0.5], only="*_up/*", measure=clock
    )
    pruned = jaxprune.prune(
        TRANSFORMER.apply, WEIGHTS, TOKENS, budget=0.9, cost=table, only="*_up/*"
    )
    # end
    sizes = {name: int(kept.sum()) for name, kept in pruned.plan.items()}
    assert table.value(sizes) <= 0.9 * table.full


def clock(fn, args, kwargs):
    return 1e-9 * jaxprune.costs(fn, *args, **kwargs).flops


@relaxed
def test_only_the_encoder():
    # code
    pruned = jaxprune.prune(
        TRANSFORMER.apply, WEIGHTS, TOKENS, sparsity=0.5, only="params/encoder_*_up/*"
    )
    # end
    widths = {
        n: w["kernel"].shape[-1]
        for n, w in pruned.variables["params"].items()
        if "_up" in n
    }
    assert widths == {"encoder_0_up": 16, "encoder_1_up": 16, "decoder_up": 16}
    assert pruned.plan["params/decoder_up/kernel:1"].all()


@relaxed
def test_one_layer_pinned():
    # code
    pruned = jaxprune.prune(
        NET.apply, VARIABLES, X, sparsity=0.5, pin="params/hidden/kernel:1"
    )
    # end
    assert pruned.variables["params"]["hidden"]["kernel"].shape == (4, 12)


@relaxed
def test_a_haiku_resnet_nobody_wrote_here():
    options = {
        "bottleneck": False,
        "channels_per_group": [4, 4, 8, 8],
        "resnet_v2": True,
    }
    forward = lambda x, training: hk.nets.ResNet([1] * 4, 5, **options)(x, training)  # noqa: E731
    net, x = (
        hk.without_apply_rng(hk.transform_with_state(forward)),
        jnp.ones((1, 16, 16, 3)),
    )
    params, state = net.init(jax.random.key(0), x, True)
    # code
    apply_fn, variables = for_haiku.haiku_apply(net, params, state)
    pruned = jaxprune.prune(apply_fn, variables, x, False, budget=0.5)
    # end
    assert pruned.costs.flops <= 0.5 * pruned.costs_before.flops
    masked = apply_fn(jaxprune.apply_masks(variables, pruned.masks), x, False)
    np.testing.assert_allclose(pruned(x, False), masked, rtol=1e-4, atol=1e-5)


@relaxed
def test_rounds_with_resume(tmp_path):
    evaluate = lambda apply_fn, variables: -loss_fn_of(apply_fn, variables)  # noqa: E731
    # code
    run = jaxprune.rounds(
        NET.apply,
        VARIABLES,
        X,
        tx=TX,
        data=BATCHES,
        steps=2,
        rounds=2,
        sparsity=0.5,
        loss_fn=loss_fn,
        evaluate=evaluate,
        folder=tmp_path,
    )
    best = run.best
    # end
    assert len(run.history) == 3 and best.variables
    again = jaxprune.rounds(
        NET.apply,
        VARIABLES,
        X,
        tx=TX,
        data=BATCHES,
        steps=2,
        rounds=2,
        sparsity=0.5,
        loss_fn=loss_fn,
        evaluate=evaluate,
        folder=tmp_path,
    )
    assert again.history == run.history


def loss_fn_of(apply_fn, variables):
    logits = apply_fn(variables, X)
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def trained(tx, steps=4, noisy=False):
    """A loop as everybody has one."""
    params, rest = VARIABLES["params"], {"batch_stats": VARIABLES["batch_stats"]}
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        at = jaxprune.noisy_params(params, state) if noisy else params
        slopes = jax.grad(lambda p: loss_fn({"params": p, **rest}, BATCHES[0]))(at)
        updates, state = tx.update(slopes, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def zeros(params):
    return np.mean(np.asarray(params["hidden"]["kernel"]) == 0)


@relaxed
def test_gradual_adamw():
    # code
    schedule = jaxprune.schedules.linear(0.5, start=0, end=3)
    tx = training.gradual_pruning(optax.adamw(1e-2), schedule, every=1)
    # end
    assert zeros(trained(tx)[0]) == pytest.approx(0.5, abs=0.02)


@relaxed
def test_rigl():
    # code
    tx = training.rigl(optax.adamw(1e-2), 0.5, every=2, until=4)
    # end
    assert zeros(trained(tx)[0]) == pytest.approx(0.5, abs=0.02)


@relaxed
def test_two_of_four():
    # code
    masks = jaxprune.select.n_of_m(
        jaxprune.scores.l1(VARIABLES["params"]), n=2, m=4, axis=-2, only="hidden/kernel"
    )
    tx = jaxprune.hold_masks(optax.adamw(1e-2), masks)
    # end
    kernel = np.asarray(trained(tx)[0]["hidden"]["kernel"])
    assert zeros(trained(tx)[0]) == 0.5 and kernel.shape == (8, 12)


@relaxed
def test_bridgeout():
    # code
    tx = optax.chain(jaxprune.bridgeout(rate=0.3, q=1.0, key=0), optax.adam(1e-2))
    # end
    before = loss_fn(VARIABLES, BATCHES[0])
    params, _ = trained(tx, steps=40, noisy=True)
    assert loss_fn({**VARIABLES, "params": params}, BATCHES[0]) < before


def installed(*packages):
    return all(map(importlib.util.find_spec, packages))


@relaxed
def test_export(tmp_path):
    from jaxprune import io

    pruned = jaxprune.prune(
        TRANSFORMER.apply, WEIGHTS, TOKENS, sparsity=0.5, exact=False, only="*_up/*"
    )
    # code
    io.save_exported(tmp_path / "stablehlo", pruned.apply_fn, pruned.variables, TOKENS)
    io.save_safetensors(tmp_path / "small.safetensors", pruned.variables)
    if installed("tensorflow", "ai_edge_litert"):
        io.save_tflite(tmp_path / "a.tflite", pruned.apply_fn, pruned.variables, TOKENS)
    if installed("jax2onnx", "onnxruntime"):
        io.save_onnx(tmp_path / "a.onnx", pruned.apply_fn, pruned.variables, TOKENS)
    # end
    model = io.load_exported(tmp_path / "stablehlo")
    np.testing.assert_allclose(model(TOKENS), pruned(TOKENS), rtol=1e-4, atol=1e-5)
    again = io.load_safetensors(tmp_path / "small.safetensors").variables
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, pruned.variables)


@relaxed
def test_the_picture(tmp_path):
    pruned = jaxprune.prune(NET.apply, VARIABLES, X, sparsity=0.5)
    # code
    print(pruned)
    pruned.figure().savefig(tmp_path / "groups.png")
    pruned.report(tmp_path / "report.html", metrics={"accuracy": 0.97})
    # end
    assert "conv/kernel:3" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "groups.png").read_bytes()[:4] == b"\x89PNG"


@relaxed
def test_the_command_line(tmp_path, monkeypatch, capsys):
    from jaxprune.cli import main

    monkeypatch.chdir(tmp_path)
    text = "import test_tasks as t\ndef make():\n    return t.NET.apply, t.VARIABLES, t.X\n"
    (tmp_path / "task_model.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    # code
    assert main(["inspect", "task_model:make"]) == 0
    assert main(["prune", "task_model:make", "--budget", "0.5", "--out", "small"]) == 0
    # end
    assert "units kept" in capsys.readouterr().out
    assert jaxprune.load("small")(X).shape == (8, 4)


def test_there_are_sixteen_of_at_most_five_lines():
    tasks = {n: f.task for n, f in globals().items() if hasattr(f, "task")}
    assert len(tasks) == 16
    for name, task in tasks.items():
        body = textwrap.dedent(inspect.getsource(task))
        code = body.split("# code\n")[1].split("# end")[0]
        assert 1 <= len(ast.parse(textwrap.dedent(code)).body) <= 5, name
