"""A pruned model in one folder: loaded with its function or without, or refused."""

import json
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.io import load_pruned, save_pruned


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(x)))
        return {"logits": nn.Dense(4)(x.mean((1, 2))), "wide": x}


NET, X = Net(), np.linspace(-1, 1, 3 * 64 * 2, dtype=np.float32).reshape(3, 8, 8, 2)


@pytest.fixture(scope="module")
def pruned():
    variables = NET.init(jax.random.key(1), X[:1])
    return jaxprune.prune(NET.apply, variables, X[:1], sparsity=0.5)


@pytest.fixture(scope="module")
def plan(pruned):
    masks = {"a": 1}
    return {"note": masks}


@pytest.fixture(scope="module")
def folder(pruned, plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("home") / "pruned"
    words = pruned.apply_fn, pruned.variables, pruned.masks, X
    facts = {"accuracy": 0.5}
    save_pruned(
        folder, *words, groups=pruned.groups, plan=plan, facts=facts, train=False
    )
    return folder


def same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("apply_fn", [None, NET.apply], ids=["program", "narrowed"])
def test_the_same_bits_come_back(pruned, plan, folder, apply_fn):
    found = load_pruned(folder, apply_fn)
    same(found.variables, pruned.variables)
    same(found.masks, jax.tree.map(np.asarray, pruned.masks))
    assert (found.plan, found.facts) == (plan, {"accuracy": 0.5})
    own = jax.jit(pruned.apply_fn)(pruned.variables, X)
    same(jax.jit(found.apply_fn)(found.variables, X), own)
    more = np.concatenate([X, X[:2]])
    wanted = pruned.apply_fn(pruned.variables, more)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        found.apply_fn(found.variables, more, train=False),
        wanted,
    )


def test_groups_come_back(pruned, folder):
    groups = load_pruned(folder).groups
    assert repr(groups) == repr(pruned.groups)
    assert repr(groups.pinned) == repr(pruned.groups.pinned)
    assert [pin.reason for pin in groups.pinned] == [
        pin.reason for pin in pruned.groups.pinned
    ]
    assert groups.shapes == pruned.groups.shapes
    assert groups.treedef == pruned.groups.treedef
    for name, group in pruned.groups.items():
        for one, other in zip(groups[name].members, group.members, strict=True):
            assert (one.path, one.axis, one.role) == (
                other.path,
                other.axis,
                other.role,
            )
            np.testing.assert_array_equal(one.index, other.index)
    keep = {name: np.arange(g.size) % 3 > 0 for name, g in groups.items()}
    same(
        jaxprune.expand_masks(groups, keep), jaxprune.expand_masks(pruned.groups, keep)
    )


ELSEWHERE = """
import sys, numpy as np, jax
from jaxprune.io import load_pruned
model = load_pruned(sys.argv[1])
x = np.linspace(-1, 1, 3 * 64 * 2, dtype=np.float32).reshape(3, 8, 8, 2)
np.savez(sys.argv[2], **jax.jit(model.apply_fn)(model.variables, x))
assert "flax" not in sys.modules
"""


def test_another_process_computes_the_same_bits(pruned, folder, tmp_path):
    out = tmp_path / "out.npz"
    subprocess.run([sys.executable, "-c", ELSEWHERE, folder, out], check=True)
    own = jax.jit(pruned.apply_fn)(pruned.variables, X)
    with np.load(out) as found:
        same({name: found[name] for name in found.files}, own)


def test_what_is_built_in_cannot_be_changed(folder):
    model = load_pruned(folder)
    for wrong in ({"train": True}, {"mutable": []}):
        with pytest.raises(TypeError, match="built in: train=False; load it with the"):
            model.apply_fn(model.variables, X, **wrong)
    with pytest.raises(TypeError, match="takes 1 arguments after the variables, got 2"):
        model.apply_fn(model.variables, X, X)


def test_programs_that_do_not_map_over_a_batch_have_fixed_shapes(tmp_path):
    def centred(params, x, scale, flag):
        assert flag == "on"
        return (x - x.mean(0, keepdims=True)) @ params[0] * scale

    params, x = [jnp.arange(6.0).reshape(3, 2)], np.arange(12.0, dtype=np.float32)
    words = params, [np.array(True)], x.reshape(4, 3), jnp.float32(2), "on"
    save_pruned(tmp_path / "it", centred, *words)
    model = load_pruned(tmp_path / "it")
    args = words[2:]
    same(
        jax.jit(model.apply_fn, static_argnums=3)(params, *args), centred(params, *args)
    )
    about = json.loads((tmp_path / "it" / "pruned.json").read_text())
    assert about["program"]["batch"].startswith("fixed: args/")
    with pytest.raises(ValueError, match=r"batch of one size, float32\[4,3\]"):
        model.apply_fn(params, x.reshape(4, 3)[:2], *args[1:])
    # Mapped over a batch it would compute something else: that is measured.
    save_pruned(tmp_path / "two", lambda p, x: centred(p, x, 1, "on"), *words[:3])
    about = json.loads((tmp_path / "two" / "pruned.json").read_text())
    assert "differs from the function it was made from" in about["program"]["batch"]


def test_trees_without_their_classes(tmp_path, pruned):
    variables = nn.FrozenDict(a=(jnp.ones((2, 3)), None), key=jax.random.key(3))
    masks = jax.tree.map(lambda _: np.array(True), variables)
    frozen = {"v": variables}

    def fn(v, x):
        return x @ v["v"]["a"][0]

    save_pruned(tmp_path, fn, frozen, {"v": masks}, np.ones((1, 2), np.float32))
    found = load_pruned(tmp_path)
    assert found.variables["v"]["a"][1] is None and type(found.variables["v"]) is dict
    wide = load_pruned(tmp_path, fn, like=frozen)
    assert jax.tree.structure(wide.variables) == jax.tree.structure(frozen)
    assert wide.variables["v"]["key"].dtype == variables["key"].dtype
    x = np.ones((4, 2), np.float32)
    for model in (found, wide):
        np.testing.assert_array_equal(
            model.apply_fn(model.variables, x), np.full((4, 3), 2)
        )
    with pytest.raises(
        ValueError, match="like lacks the leaf v/a/0, unlike the model in"
    ):
        load_pruned(tmp_path, fn, like={})


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def missing(path):
    path.unlink()


def a_pipe(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def data_of(path):
    files = (path / "variables" / "0" / "state").rglob("d/*")
    return max(files, key=lambda file: file.stat().st_size)


FILES = {
    "pruned.json": lambda folder: folder / "pruned.json",
    "program.jaxexport": lambda folder: folder / "program.jaxexport",
    "masks.npz": lambda folder: folder / "masks.npz",
    "indices.npz": lambda folder: folder / "indices.npz",
    "variables": data_of,
}


@pytest.fixture(scope="module")
def contents(folder):
    return {
        p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [truncated, flipped, missing, a_pipe])
@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_named(contents, tmp_path, name, damage):
    for path, content in contents.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    damage(FILES[name](tmp_path))
    told = r"holds no pruned model: pruned\.json" if damage is missing else "is damaged"
    if name != "pruned.json":
        told = rf"is damaged: {name}"
    with pytest.raises(ValueError, match=told):
        load_pruned(tmp_path, NET.apply)


def test_what_is_not_there_is_told(tmp_path, pruned):
    with pytest.raises(ValueError, match=r"holds no pruned model: pruned\.json is"):
        load_pruned(tmp_path)
    with pytest.raises(ValueError, match="holds no pruned model: .*nowhere does not"):
        load_pruned(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="it is a file, not a folder"):
        load_pruned(__file__)
    (tmp_path / "thesis.tex").write_text("")
    words = pruned.apply_fn, pruned.variables, pruned.masks
    with pytest.raises(ValueError, match=r"holds something else, such as thesis\.tex"):
        save_pruned(tmp_path, *words)
    save_pruned(tmp_path / "it", *words)
    assert load_pruned(tmp_path / "it", NET.apply).groups is None
    with pytest.raises(
        ValueError, match="holds no program: give the original function"
    ):
        load_pruned(tmp_path / "it")
    with pytest.raises(ValueError, match="the keyword argument rngs/a is an array"):
        save_pruned(tmp_path / "it", *words, X, rngs={"a": jax.random.key(0)})
    with pytest.raises(TypeError, match="JSON"):
        save_pruned(tmp_path / "it", *words, facts={"a": object()})


def test_another_function_is_refused(folder):
    with pytest.raises(ValueError, match=r"not the function .* it returns float32\["):
        load_pruned(folder, lambda variables, x, train: x)
    with pytest.raises(
        ValueError, match="not the function .* it raises KeyError: 'no'"
    ):
        load_pruned(folder, lambda variables, x, train: variables["no"])


class Killed(BaseException):
    pass


def test_a_kill_leaves_the_old_or_the_new_model(tmp_path, monkeypatch):
    def fn(v, x):
        return x * v[None, None]

    masks, x = np.array(True), np.ones((1, 2), np.float32)
    done, moment = False, 0
    save_pruned(tmp_path, fn, jnp.ones(()), masks, x)
    while not done:
        moment += 1
        lives = [moment]

        def mortal(act, lives=lives):
            def wrapped(*args, **kwargs):
                lives[0] -= 1
                if lives[0] == 0:
                    raise Killed
                return act(*args, **kwargs)

            return wrapped

        before = float(load_pruned(tmp_path).variables)
        with monkeypatch.context() as patch:
            for name in ("unlink", "replace", "write_bytes"):
                patch.setattr(
                    f"pathlib.Path.{name}",
                    mortal(getattr(jaxprune.io._files.Path, name)),
                )
            patch.setattr("shutil.rmtree", mortal(jaxprune.io._folders.shutil.rmtree))
            try:
                save_pruned(tmp_path, fn, jnp.float32(before + 1), masks, x)
                done = True
            except Killed:
                pass
        now = load_pruned(tmp_path, fn)
        assert float(now.variables) in {before, before + 1}
        assert not done or float(now.variables) == before + 1
        assert moment < 60
    save_pruned(tmp_path, fn, jnp.float32(0), masks, x)
    assert len(list(tmp_path.iterdir())) == 5  # with the lock


# ------------------------------------------------------- what a loaded program can do


def mlp(params, x, scale, *, power=1):
    return jnp.tanh(x @ params["a"]) ** power @ params["b"] * scale


PARAMS = {"a": jnp.linspace(-1, 1, 12).reshape(3, 4), "b": jnp.ones((4, 2))}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An MLP pruned and saved, with arguments of its own built in."""
    folder = tmp_path_factory.mktemp("mlp") / "small"
    call = mlp, PARAMS, np.ones((5, 3), np.float32), 2.0
    jaxprune.prune(*call, kwargs={"power": 3}, sparsity=0.5).save(folder)
    return folder


def test_the_example_arguments_come_back(small):
    for apply_fn in (None, mlp):
        loaded = jaxprune.load(small, apply_fn)
        x, scale = loaded.args
        assert (x.shape, x.dtype, scale, loaded.kwargs) == (
            (5, 3),
            np.float32,
            2.0,
            {"power": 3},
        )
    assert loaded.costs.flops == 0.5 * loaded.costs_before.flops
    again = jaxprune.prune(loaded, sparsity=0.5)
    assert again.variables["a"].shape == (3, 1)
    assert "parameters: 20 -> 5 (25.0%)" in str(again)  # counted anew
    assert loaded.measured().seconds is not None


def test_a_loaded_program_is_saved_again_and_exported(small, tmp_path):
    loaded = jaxprune.load(small)
    x = np.linspace(-1, 1, 21, dtype=np.float32).reshape(7, 3)  # of another batch
    wanted = loaded(x, 2.0, power=3)
    loaded.save(tmp_path / "again")
    again = jaxprune.load(tmp_path / "again")
    np.testing.assert_allclose(again(x, 2.0, power=3), wanted, rtol=1e-6)
    jaxprune.io.save_exported(
        tmp_path / "exported",
        lambda variables, x: loaded.apply_fn(variables, x, 2.0, power=3),
        loaded.variables,
        x[:2],
    )
    model = jaxprune.io.load_exported(tmp_path / "exported")
    np.testing.assert_allclose(model(x), wanted, rtol=1e-6)


def test_a_program_of_one_batch_size_is_saved_again(tmp_path):
    centred = lambda params, x: (x - x.mean(0, keepdims=True)) @ params["a"]  # noqa: E731
    chain = lambda params, x: jnp.tanh(centred(params, x)) @ params["b"]  # noqa: E731
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    jaxprune.prune(chain, PARAMS, x, sparsity=0.5).save(tmp_path / "one")
    loaded = jaxprune.load(tmp_path / "one")
    loaded.save(tmp_path / "two")
    np.testing.assert_allclose(jaxprune.load(tmp_path / "two")(x), loaded(x), rtol=1e-6)
    with pytest.raises(ValueError, match="takes a batch of one size"):
        jaxprune.io.save_exported(tmp_path / "no", loaded.apply_fn, loaded.variables, x)
    assert not (tmp_path / "no").exists()


def test_what_needs_the_source_says_so(small):
    loaded = jaxprune.load(small)
    for ask in (
        lambda: loaded.costs,
        lambda: loaded.costs_before,
        loaded.measured,
        lambda: jaxprune.prune(loaded, sparsity=0.5),
    ):
        with pytest.raises(ValueError, match=r"jaxprune\.load\(folder, apply_fn\)"):
            ask()
    assert "2 of 4 units kept" in str(loaded) and loaded.figure()
