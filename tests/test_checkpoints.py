import json
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
from jaxprune.io import checkpoints


@pytest.fixture
def state():
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3, jnp.bfloat16)}
    tx = optax.chain(jaxprune.bridgeout(key=3), optax.adam(0.1))
    return {
        "params": params,
        "opt_state": tx.init(params),
        "masks": {"w": np.array([[True, False, True]])},
        "key": jax.random.key(7),
        "other key": jax.random.key(7, impl="rbg"),
        "epoch": 4,
        "rate": 0.5,
    }


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for path, leaf in jax.tree.leaves_with_path(wanted):
        other = dict(jax.tree.leaves_with_path(found))[path]
        if hasattr(leaf, "dtype"):
            assert other.dtype == leaf.dtype, path
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf, other = jax.random.key_data(leaf), jax.random.key_data(other)
        np.testing.assert_array_equal(np.asarray(other), np.asarray(leaf))


def test_everything_comes_back(tmp_path, state):
    meta = {"keep": {"conv1:3": [0, 2]}, "note": "naïve"}
    checkpoints.save(tmp_path, 3, state, meta)
    step, found, found_meta = checkpoints.restore_latest(tmp_path, state)
    assert (step, found_meta) == (3, meta)
    assert_same(found, state)


def test_a_continued_optimiser_takes_the_same_step(tmp_path):
    tx = optax.sgd(0.1, momentum=0.9)
    params = {"w": jnp.array([1.0, -2.0])}
    grads = {"w": jnp.array([0.3, 0.1])}
    _, opt_state = tx.update(grads, tx.init(params))
    checkpoints.save(tmp_path, 0, opt_state)
    restored = checkpoints.restore_latest(tmp_path, tx.init(params)).state
    wanted, _ = tx.update(grads, opt_state)
    found, _ = tx.update(grads, restored)
    np.testing.assert_array_equal(found["w"], wanted["w"])


def steps(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_only_the_newest_are_kept(tmp_path):
    for step in range(5):
        checkpoints.save(tmp_path, step, {"w": jnp.full(2, float(step))}, keep=2)
    assert steps(tmp_path) == [3, 4]
    assert checkpoints.restore_latest(tmp_path, {"w": jnp.zeros(2)}).state["w"][0] == 4


def test_saving_an_older_step_forgets_the_later_ones(tmp_path):
    for step in (1, 2, 3):
        checkpoints.save(tmp_path, step, {"w": jnp.full(2, float(step))})
    checkpoints.save(tmp_path, 2, {"w": jnp.full(2, 20.0)})
    assert steps(tmp_path) == [1, 2]
    found = checkpoints.restore_latest(tmp_path, {"w": jnp.zeros(2)})
    assert (found.step, float(found.state["w"][0])) == (2, 20.0)


def test_nothing_to_restore(tmp_path):
    assert checkpoints.restore_latest(tmp_path / "missing", {}) is None
    assert not (tmp_path / "missing").exists()
    assert checkpoints.restore_latest(tmp_path, {"w": jnp.zeros(2)}) is None


def test_like_may_depend_on_meta(tmp_path):
    checkpoints.save(tmp_path, 1, {"w": jnp.ones(3)}, {"size": 3})
    found = checkpoints.restore_latest(tmp_path, lambda m: {"w": jnp.zeros(m["size"])})
    assert found.state["w"].shape == (3,)


def largest_file(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def flip_a_bit(folder):
    path = largest_file(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(folder):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_the_json(folder):
    path = folder / "meta" / "metadata"
    path.write_bytes(path.read_bytes()[:-9])


def change_the_json(folder):
    path = folder / "meta" / "metadata"
    content = json.loads(path.read_text())
    content["meta"] = {"step": 1}
    path.write_text(json.dumps(content))


def lose_the_arrays(folder):
    for path in (folder / "state").rglob("*"):
        if path.is_file() and path.name != "_METADATA":
            path.unlink()


DAMAGES = [flip_a_bit, truncate, cut_the_json, change_the_json, lose_the_arrays]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_walks_back_from_damage(tmp_path, damage):
    rng = np.random.default_rng(0)
    trees = [{"w": rng.standard_normal(50_000).astype(np.float32)} for _ in range(3)]
    for step, tree in enumerate(trees):
        checkpoints.save(tmp_path, step, tree, {"step": step})
    like = {"w": np.zeros(50_000, np.float32)}
    damage(tmp_path / "2")
    with pytest.warns(UserWarning, match="checkpoint 2 in .* is damaged"):
        found = checkpoints.restore_latest(tmp_path, like)
    assert (found.step, found.meta) == (1, {"step": 1})
    np.testing.assert_array_equal(found.state["w"], trees[1]["w"])

    checkpoints.save(tmp_path, 2, trees[2], {"step": 2})  # the run goes on over it
    assert checkpoints.restore_latest(tmp_path, like).step == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_undamaged_is_nothing(tmp_path):
    tree = {"w": np.random.default_rng(0).standard_normal(50_000)}
    checkpoints.save(tmp_path, 1, tree)
    flip_a_bit(tmp_path / "1")
    with pytest.warns(UserWarning, match="w is not what was saved|damaged"):
        assert checkpoints.restore_latest(tmp_path, tree) is None


@pytest.mark.parametrize(
    ("like", "text"),
    [
        ({"w": jnp.zeros(2)}, "lacks the leaf b, unlike the checkpoint in"),
        (
            {"w": jnp.zeros(2), "b": jnp.zeros(2), "c": jnp.zeros(1)},
            "asks for the leaf c",
        ),
        (
            {"w": jnp.zeros(3), "b": jnp.zeros(2)},
            r"w was saved in .* float32\[2\], but like asks for float32\[3\]; .*width",
        ),
        ({"w": jnp.zeros(2), "b": jnp.zeros(2, int)}, r"float32\[2\], .* int32\[2\]"),
    ],
)
def test_a_wrong_like_is_no_damage(tmp_path, like, text):
    checkpoints.save(tmp_path, 1, {"w": jnp.ones(2), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match=text):
        checkpoints.restore_latest(tmp_path, like)


def test_bad_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="step must be 0 or more"):
        checkpoints.save(tmp_path, -1, {"w": jnp.ones(1)})
    with pytest.raises(ValueError, match="keep=0"):
        checkpoints.save(tmp_path, 1, {"w": jnp.ones(1)}, keep=0)


SAVES_FOR_EVER = """
import sys, itertools, numpy as np
from jaxprune.io import checkpoints
for step in itertools.count():
    tree = {str(i): np.full(300_000, step, np.float32) for i in range(8)}
    checkpoints.save(sys.argv[1], step, tree, keep=2)
"""


def test_survives_a_kill_at_any_moment(tmp_path):
    like = {str(i): np.zeros(300_000, np.float32) for i in range(8)}
    last = -1
    for pause in (0.03, 0.2):
        saver = subprocess.Popen([sys.executable, "-c", SAVES_FOR_EVER, tmp_path])
        begin = time.monotonic()
        while not (tmp_path / "1").is_dir() and time.monotonic() < begin + 100:
            time.sleep(0.01)
        time.sleep(pause)
        saver.send_signal(signal.SIGKILL)
        saver.wait()
        found = checkpoints.restore_latest(tmp_path, like)
        assert found.step >= 0
        for leaf in found.state.values():
            np.testing.assert_array_equal(leaf, np.float32(found.step))
        last = max(last, found.step)
    assert last >= 1
