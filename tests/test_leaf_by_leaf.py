"""A checkpoint larger than memory is pruned one leaf at a time, as docs/speed.md says."""

import pathlib
import re

import jax
import numpy as np

import jaxprune

DOCUMENT = pathlib.Path(__file__).parents[1] / "docs" / "speed.md"


def mlp(params, x):
    return jax.nn.relu(x @ params["w1"] + params["b"][None]) @ params["w2"]


def test_the_snippet_prunes_as_all_at_once():
    rng = np.random.default_rng(0)
    sizes = {"w1": (3, 8), "b": (8,), "w2": (8, 2)}
    params = {k: rng.normal(size=n).astype(np.float32) for k, n in sizes.items()}
    shapes = jax.eval_shape(lambda: params)
    x = np.ones((1, 3), np.float32)
    written = {}
    [snippet] = re.findall(
        r"larger than memory.*?```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL
    )
    scope = {"jax": jax, "np": np, "jaxprune": jaxprune, "shapes": shapes}
    scope |= {"apply_fn": mlp, "args": (x,), "read": params.get}
    exec(snippet, scope | {"write": written.__setitem__})

    groups = jaxprune.trace(mlp, params, x)
    scores = jaxprune.group_scores(groups, jaxprune.scores.l2(params))
    keep = jaxprune.select.per_group(groups, scores, sparsity=0.5)
    wanted = jaxprune.slice_params(params, jaxprune.expand_masks(groups, keep))
    assert written["w1"].shape == (3, 4)
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(written[path], leaf)


def test_l2_scores_need_no_tree_of_their_own():
    rng = np.random.default_rng(1)
    sizes = {"w1": (3, 8), "b": (8,), "w2": (8, 2)}
    params = {k: rng.normal(size=n).astype(np.float32) for k, n in sizes.items()}
    groups = jaxprune.trace(mlp, params, np.ones((1, 3), np.float32))
    direct = jaxprune.group_scores(groups, params, reduce="l2")
    scored = jaxprune.group_scores(groups, jaxprune.scores.l2(params))
    for name in groups:
        np.testing.assert_allclose(direct[name], scored[name], rtol=1e-6)
