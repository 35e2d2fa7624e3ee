import json
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.io.export import load_exported, save_exported


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for width in (6, 8):
            x = nn.Conv(width, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(4)(x.mean((1, 2)))


@pytest.fixture(scope="module")
def pruned():
    net, x = Net(), jnp.zeros((1, 8, 8, 3))
    variables = net.init(jax.random.key(1), x)
    groups = jaxprune.trace(net.apply, variables, x)
    keep = {n: np.arange(g.size) % 2 == 0 for n, g in groups.items()}
    masks = jaxprune.expand_masks(groups, keep)
    small = jaxprune.slice_params(variables, masks)
    masked = jaxprune.apply_masks(variables, masks)
    return jaxprune.narrow(net.apply, masks), small, lambda x: net.apply(masked, x)


@pytest.fixture(scope="module")
def folder(pruned, tmp_path_factory):
    apply_fn, small, _ = pruned
    folder = tmp_path_factory.mktemp("exported")
    facts = {"accuracy": 0.5}
    save_exported(folder, apply_fn, small, jnp.zeros((2, 8, 8, 3)), facts=facts)
    return folder


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_equals_the_masked_model_at_any_batch_size(pruned, folder, batch):
    x = jax.random.normal(jax.random.key(batch), (batch, 8, 8, 3))
    np.testing.assert_allclose(
        load_exported(folder)(x), pruned[2](x), rtol=1e-5, atol=1e-6
    )


def test_keeps_variables_and_facts(pruned, folder):
    model = load_exported(folder)
    assert model.facts == {"accuracy": 0.5}
    assert jax.tree.structure(model.variables) == jax.tree.structure(pruned[1])
    jax.tree.map(np.testing.assert_array_equal, model.variables, pruned[1])


def test_plain_numpy_reads_the_parameters(pruned, folder):
    with np.load(folder / "parameters.npz") as stored:
        kernel = stored["params/Conv_1/kernel"]
    np.testing.assert_array_equal(kernel, pruned[1]["params"]["Conv_1"]["kernel"])
    assert kernel.shape == (3, 3, 3, 4)


def test_says_what_made_it(folder):
    about = json.loads((folder / "model.json").read_text())
    assert about["versions"]["jax"] == jax.__version__
    assert about["inputs"] == ["float32[batch,8,8,3]"]
    assert set(about["platforms"]) == {"cpu", "cuda", "tpu"}


RUNS_WITHOUT_THE_MODEL = """
import sys, numpy as np
from jaxprune.io.export import load_exported
x = np.linspace(-1, 1, 5 * 8 * 8 * 3, dtype=np.float32).reshape(5, 8, 8, 3)
np.save(sys.argv[2], load_exported(sys.argv[1])(x))
assert "flax" not in sys.modules
"""


def test_runs_without_the_code_of_the_model(pruned, folder, tmp_path):
    out = tmp_path / "out.npy"
    words = [sys.executable, "-c", RUNS_WITHOUT_THE_MODEL, folder, out]
    subprocess.run(words, check=True)
    x = np.linspace(-1, 1, 5 * 8 * 8 * 3, dtype=np.float32).reshape(5, 8, 8, 3)
    np.testing.assert_allclose(np.load(out), pruned[2](x), rtol=1e-5, atol=1e-6)


def test_trees_of_arguments_and_low_precision(tmp_path):
    variables = [jnp.array([1.5, -2.0], jnp.bfloat16), {"b": jnp.array([3, 4])}]

    def apply_fn(variables, inputs, scale):
        y = inputs["x"].astype(jnp.bfloat16) * variables[0][None] * scale[:, None]
        return {"y": y, "b": jnp.broadcast_to(variables[1]["b"], y.shape)}

    inputs = {"x": jnp.ones((4, 2))}
    scale = jnp.arange(4).astype(jnp.bfloat16)
    save_exported(tmp_path, apply_fn, variables, inputs, scale)
    model = load_exported(tmp_path)
    assert model.variables[0].dtype == jnp.bfloat16
    found = model(inputs, scale)
    expected = np.outer([0, 1, 2, 3], [1.5, -2.0])
    np.testing.assert_array_equal(found["y"].astype(jnp.float32), expected)
    np.testing.assert_array_equal(found["b"], [[3, 4]] * 4)


@pytest.mark.parametrize("name", ["function.jaxexport", "parameters.npz"])
def test_notices_a_flipped_bit(pruned, tmp_path, name):
    save_exported(tmp_path, pruned[0], pruned[1], jnp.zeros((1, 8, 8, 3)))
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"is damaged: {name} is not what was saved"):
        load_exported(tmp_path)


def test_notices_what_is_missing(pruned, tmp_path):
    with pytest.raises(ValueError, match=r"holds no exported model: model\.json"):
        load_exported(tmp_path)
    save_exported(tmp_path, pruned[0], pruned[1], jnp.zeros((1, 8, 8, 3)))
    (tmp_path / "parameters.npz").unlink()
    with pytest.raises(ValueError, match=r"damaged: .*parameters\.npz"):
        load_exported(tmp_path)


def test_every_argument_has_a_batch_axis(tmp_path):
    with pytest.raises(ValueError, match=r"args/1 has no axes.*close over"):
        save_exported(tmp_path, lambda v, x, t: x * t, {}, jnp.ones((2, 2)), 0.5)
