import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune
from jaxprune.io import checkpoints
from jaxprune.io._checksums import _block_checksum, local_checksum

pytestmark = pytest.mark.once


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


ENDLESS: dict[str, object] = {}
ENDLESS["itself"] = ENDLESS
HOLLOW = jax.ShapeDtypeStruct((2,), jnp.float32)
REFUSED = [
    ({"step": -1}, ValueError, "step must be at least 0, got step=-1"),
    ({"step": 1.5}, TypeError, "step must be an int, got 1.5 of type float"),
    ({"step": True}, TypeError, "step must be an int, got True of type bool"),
    ({"step": "2"}, TypeError, "step must be an int, got '2'"),
    ({"step": None}, TypeError, "step must be an int, got None"),
    ({"keep": 0}, ValueError, "keep=0"),
    ({"keep": 1.0}, TypeError, "keep must be an int"),
    ({"meta": object()}, TypeError, "meta must be what JSON can hold: .*object"),
    ({"meta": {"a": {1, 2}}}, TypeError, "meta must be what JSON can hold: .*set"),
    ({"meta": {(1, 2): 3}}, TypeError, "meta must be what JSON can hold"),
    ({"meta": ENDLESS}, TypeError, "meta must be what JSON can hold: Circular"),
    ({"state": {"w": HOLLOW}}, TypeError, "w is a ShapeDtypeStruct, which has no val"),
    ({"state": {"w": "text"}}, TypeError, "w is of type str; a checkpoint holds"),
    ({"state": {"w": np.array([None])}}, TypeError, "w has dtype object"),
    ({"state": {"w": np.array(["a"])}}, TypeError, "w has dtype <U1"),
    ({"state": {"w": 1j}}, TypeError, "w is of type complex"),
    ({"state": {"a/b": 1, "a": {"b": 2}}}, ValueError, "two leaves are named a/b"),
]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two steps")
    for step in (1, 2):
        checkpoints.save(folder, step, {"w": jnp.full(2, float(step))})
    return folder


@pytest.mark.parametrize(("wrong", "kind", "text"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused_deletes_nothing(two_steps, wrong, kind, text):
    right = {"step": 1, "state": {"w": jnp.zeros(2)}, "meta": None, "keep": 1}
    with pytest.raises(kind, match=text):
        checkpoints.save(two_steps, **{**right, **wrong})
    assert steps(two_steps) == [1, 2]
    assert checkpoints.restore_latest(two_steps, {"w": jnp.zeros(2)}).state["w"][0] == 2


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"n": 2**70, "rate": float("inf"), "flag": True},
        {"w": jnp.zeros((0, 3), jnp.bfloat16), "m": np.zeros((2, 0), np.int8)},
        {"w": jnp.zeros((0, 3)), "b": jnp.ones(2), "scalar": np.float32(3)},
        [
            jnp.array([1, 2], jnp.int4),
            jnp.array([1 + 2j]),
            np.array([1, 2], np.float64),
        ],
    ],
    ids=["nothing", "numbers", "emptied", "half emptied", "rare dtypes"],
)
def test_states_that_orbax_alone_does_not_hold(tmp_path, state):
    checkpoints.save(tmp_path, 1, state)
    found = checkpoints.restore_latest(tmp_path, state).state
    assert_same(found, state)
    for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
        on_host = isinstance(leaf, np.ndarray | np.generic)
        assert isinstance(other, np.ndarray) == on_host


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.mark.parametrize("step", [2, 4])
def test_at_every_point_the_newest_is_the_old_one_or_the_new_one(
    tmp_path, monkeypatch, step
):
    like, lives = {"w": jnp.zeros(2)}, 0

    def mortal(act):
        def wrapped(*args, **kwargs):
            nonlocal lives
            lives -= 1
            if lives == 0:
                raise Killed
            return act(*args, **kwargs)

        return wrapped

    for moment in range(1, 100):
        folder = tmp_path / str(moment)
        for before in (1, 2, 3):
            checkpoints.save(folder, before, {"w": jnp.full(2, float(before))})
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", mortal(Path.replace))
            patch.setattr(checkpoints.shutil, "rmtree", mortal(shutil.rmtree))
            lives = moment
            try:
                checkpoints.save(folder, step, {"w": jnp.full(2, 9.0)}, keep=2)
                done = True
            except Killed:
                done = False
        found = checkpoints.restore_latest(folder, like)
        state = (found.step, float(found.state["w"][0]))
        assert state == (step, 9) if done else state in {(3, 3.0), (step, 9.0)}
        checkpoints.save(folder, 7, {"w": jnp.full(2, 7.0)}, keep=1)
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "7"]
        if done:
            break
    assert done and moment > 1


CANNOT_WRITE = """
import resource, signal, sys, numpy as np
from jaxprune import checkpoints
theirs, own = sys.argv[1:]
try:
    checkpoints.save(theirs, 1, {"w": np.ones(1)})
except OSError as error:
    print(error)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tree = {"w": np.random.default_rng(0).standard_normal(100_000)}
for step in (1, 2):
    checkpoints.save(own, step, tree)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for step in (1, 2, 3):
    try:
        checkpoints.save(own, step, tree)
    except OSError as error:
        print(error)
found = checkpoints.restore_latest(own, tree)
print(found.step, (found.state["w"] == tree["w"]).all())
"""


def test_second_writers_and_full_disks_lose_nothing(two_steps, tmp_path):
    words = [sys.executable, "-c", CANNOT_WRITE, two_steps, tmp_path]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    lines = [
        line for line in done.stdout.splitlines() if "Errno" in line or "2" in line
    ]
    assert f"another process writes to {two_steps}" in lines[0]
    for step, line in enumerate(lines[1:4], 1):
        assert f"checkpoint {step} could not be written to {tmp_path}" in line
    assert lines[4:] == ["2 True"]
    assert steps(two_steps) == steps(tmp_path) == [1, 2]
    assert not list(tmp_path.glob("*.*-*")) and not list(tmp_path.glob("*.new"))


def test_a_released_folder_has_another_writer(tmp_path):
    checkpoints.save(tmp_path, 1, {"w": jnp.ones(2)})
    other = filelock.FileLock(tmp_path / ".lock", blocking=False)
    with pytest.raises(filelock.Timeout):
        other.acquire()
    checkpoints.release(tmp_path)
    with other, pytest.raises(OSError, match="another process writes to"):
        checkpoints.save(tmp_path, 2, {"w": jnp.ones(2)})
    checkpoints.save(tmp_path, 2, {"w": jnp.ones(2)})
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "complex64", "bool"])
@pytest.mark.parametrize("spec", [P("a", "b"), P("b"), P(None, "a"), P()])
def test_checksums_do_not_depend_on_the_sharding(dtype, spec):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    values = np.random.default_rng(0).normal(size=(8, 12, 3)).astype(jnp.dtype(dtype))
    whole = local_checksum(values)
    assert whole == local_checksum(jax.device_put(values, NamedSharding(mesh, spec)))
    pieces = [
        _block_checksum(values[rows, cols], (rows.start, cols.start, 0), values.shape)
        for rows in (slice(0, 3), slice(3, 8))
        for cols in (slice(0, 5), slice(5, 12))
    ]
    assert whole == sum(pieces) % 2**64


def test_checksums_see_every_bit_and_every_swap():
    values = np.arange(70_000, dtype=np.uint16)
    whole = local_checksum(values)
    rng = np.random.default_rng(0)
    for at, bit in rng.integers(0, (70_000, 16), (64, 2)):
        other = values.copy()
        other[at] ^= np.uint16(1 << bit)
        assert local_checksum(other) != whole
        other = values.copy()
        other[[at, at - 1]] = other[[at - 1, at]]
        assert local_checksum(other) != whole


SPANS_PROCESSES = """
import sys, jax, numpy as np
port, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxprune import checkpoints

mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
values = np.arange(48, dtype=np.float32).reshape(8, 6)

def spread(spec, scale=1):
    sharding = NamedSharding(mesh, spec)
    get = lambda index: scale * values[index]
    return jax.make_array_from_callback(values.shape, sharding, get)

state = {"w": spread(P("a", "b")), "same": spread(P()), "count": 3, "host": values}
for step in (1, 2, 2):
    checkpoints.save(folder, step, state, {"step": step})
found = checkpoints.restore_latest(folder, {**state, "w": spread(P("b", None), 0)})
assert (found.step, found.meta) == (2, {"step": 2})
np.testing.assert_array_equal(process_allgather(found.state["w"], tiled=True), values)
"""


def test_arrays_may_span_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, "-c", SPANS_PROCESSES, port]
    both = [subprocess.Popen([*words, str(i), tmp_path]) for i in range(2)]
    assert [process.wait(timeout=200) for process in both] == [0, 0]
    values = np.arange(48, dtype=np.float32).reshape(8, 6)
    zeros = np.zeros_like(values)
    like = {"w": zeros, "same": zeros, "count": 0, "host": zeros}
    found = checkpoints.restore_latest(tmp_path, like)  # here there is one process
    assert_same(found.state, {"w": values, "same": values, "count": 3, "host": values})
    shapeless = {**like, "w": jax.ShapeDtypeStruct((8, 6), np.float32)}
    with pytest.raises(ValueError, match="was saved on other devices: give like"):
        checkpoints.restore_latest(tmp_path, shapeless)


SAVES_FOR_EVER = """
import sys, itertools, numpy as np
from jaxprune.io import checkpoints
for step in itertools.count():
    for value in (2 * step, 2 * step + 1):  # the second replaces the first
        tree = {str(i): np.full(300_000, value, np.float32) for i in range(8)}
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
        value = found.state["0"][0]
        assert value // 2 == found.step
        for leaf in found.state.values():
            np.testing.assert_array_equal(leaf, value)
        last = max(last, found.step)
    assert last >= 1


def test_threads_may_save_at_once(tmp_path):
    """Orbax alone mixes up two saves of one process: they take turns."""
    params = {"w": jnp.arange(4096.0), "b": jnp.ones(3)}

    def rounds(name):
        for step in range(3):
            checkpoints.save(tmp_path / name, step, params)
        return checkpoints.restore_latest(tmp_path / name, params)

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(rounds, "abcd"):
            assert found is not None
            np.testing.assert_array_equal(found.state["w"], params["w"])
