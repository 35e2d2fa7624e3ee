import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune

pytestmark = pytest.mark.once


class Net(nn.Module):
    width: int = 6

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Conv(self.width, (3, 3))(x))
        z = nn.relu(y + nn.Conv(self.width, (3, 3))(y))
        return nn.Dense(3)(z.reshape(len(x), -1))


X = jnp.ones((2, 4, 4, 3))


def rotary(params, x):
    """One head with a table: its units can be cut but not reordered."""
    table = jnp.cos(jnp.arange(4.0))[None]
    q, k = (x @ params["q"]) * table, (x @ params["k"]) * table
    return q @ k.T


@pytest.fixture
def net():
    model = Net()
    variables = model.init(jax.random.key(0), X)
    groups = jaxprune.trace(model.apply, variables, X)
    return model, variables, groups


def test_plan_round_trips_and_replays_on_another_checkpoint(net, tmp_path):
    model, _, groups = net
    rng = np.random.default_rng(0)
    keep = {name: rng.random(g.size) < 0.5 for name, g in groups.items()}
    jaxprune.plans.save(tmp_path / "plan.json", groups, keep)
    other = jaxprune.trace(model.apply, model.init(jax.random.key(1), X), X)
    loaded = jaxprune.plans.load(tmp_path / "plan.json", other)
    assert loaded.keys() == keep.keys()
    for name in keep:
        np.testing.assert_array_equal(loaded[name], keep[name])


def test_plan_of_another_model_is_refused(net, tmp_path):
    _, _, groups = net
    (name,) = groups
    jaxprune.plans.save(tmp_path / "plan.json", groups, {name: np.arange(6) < 3})
    wide = Net(width=8)
    others = jaxprune.trace(
        wide.apply, jax.eval_shape(wide.init, jax.random.key(0), X), X
    )
    with pytest.raises(
        ValueError, match=r"another model: its group .* 6 units .* has 8"
    ):
        jaxprune.plans.load(tmp_path / "plan.json", others)
    data = json.loads((tmp_path / "plan.json").read_text())
    data["groups"]["nowhere:0"] = data["groups"].pop(name)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="nowhere:0, which this model does not have"):
        jaxprune.plans.load(tmp_path / "plan.json", groups)
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(ValueError, match="not a plan of format 1"):
        jaxprune.plans.load(tmp_path / "plan.json", groups)


def broken(**changes):
    """A plan of 6 units whose only entry is changed."""
    entry = {"size": 6, "members": {"a:0": 1}, "removed": [1], **changes}
    return {"format": 1, "groups": {"a:0": entry}}


NO_PLANS = {
    "": "is not a plan: Expecting value",
    "\x00": "is not a plan",
    "[" * 100_000: "is not a plan",
    "null": "not a plan of format 1",
    '{"format": true, "groups": {}}': "not a plan of format 1",
    '{"format": 2, "groups": {}}': "not a plan of format 1",
    '{"format": 1}': "groups must be an object",
    '{"format": 1, "groups": [1]}': "groups must be an object",
    '{"format": 1, "groups": {"a:0": 1, "a:0": 2}}': "two entries named a:0",
    '{"format": 1, "groups": {"a:0": null}}': "size of the group a:0 must be of type int",
}
NO_ENTRIES = [
    ({"removed": None}, "removed of the group a:0 must be of type list, got None"),
    ({"removed": {}}, "must be of type list"),
    ({"removed": [-1]}, "removes -1 from the group a:0, whose units are .* 0 to 5"),
    ({"removed": [6]}, "removes 6 from"),
    ({"removed": [10**30]}, "removes 1000000"),
    ({"removed": [True, False]}, "removes True from"),
    ({"removed": [1.0]}, r"removes 1\.0 from"),
    ({"removed": ["1"]}, "removes '1' from"),
    ({"removed": [[1, 2]]}, r"removes \[1, 2\] from"),
    ({"removed": [1, 2, 1]}, "removes unit 1 of the group a:0 twice"),
    ({"size": True}, "size of the group a:0 must be of type int, got True"),
    ({"size": 6.0}, "must be of type int"),
    ({"members": ["a:0"]}, "members of the group a:0 must be of type dict"),
    ({"members": {"a:0": 2}}, "made for another model"),
]


@pytest.fixture
def one_group():
    member = jaxprune.Member("a", 0, np.arange(6)[:, None])
    tree = jax.tree.structure({"a": 0})
    group = jaxprune.Group("a:0", 6, (member,))
    return jaxprune.Groups({"a:0": group}, (), {"a": (6,)}, tree)


@pytest.mark.parametrize(("text", "says"), NO_PLANS.items(), ids=range(len(NO_PLANS)))
def test_what_is_no_plan_is_refused(one_group, tmp_path, text, says):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=rf"plan\.json .*{says}"):
        jaxprune.plans.load(tmp_path / "plan.json", one_group)


@pytest.mark.parametrize(("changes", "says"), NO_ENTRIES, ids=range(len(NO_ENTRIES)))
def test_damaged_entries_are_refused(one_group, changes, says):
    right = jaxprune.plans.from_json(broken(), one_group)
    np.testing.assert_array_equal(right["a:0"], np.arange(6) != 1)
    with pytest.raises(ValueError, match=f"the plan .*{says}"):
        jaxprune.plans.from_json(broken(**changes), one_group)


def test_plans_are_regular_files_replaced_as_a_whole(one_group, tmp_path, monkeypatch):
    path, keep = tmp_path / "plan.json", {"a:0": np.arange(6) < 3}
    with pytest.raises(ValueError, match="null is not a regular file"):
        jaxprune.plans.load("/dev/null", one_group)
    jaxprune.plans.save(path, one_group, keep)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            jaxprune.plans.save(path, one_group, {"a:0": np.arange(6) < 5})
    np.testing.assert_array_equal(
        jaxprune.plans.load(path, one_group)["a:0"], keep["a:0"]
    )
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_verify_proves_an_exact_plan(net, key):
    model, variables, groups = net
    (name,) = groups
    proof = jaxprune.plans.verify(
        model.apply, variables, X, keep={name: np.arange(6) < 3}, key=key
    )
    assert 0 < proof.narrowed < 2e-5  # random numbers, so rounding shows
    assert 0 < proof.permuted[name] < 2e-5


def test_verify_does_not_reorder_units_tied_to_a_table(key):
    params = {"q": jnp.ones((3, 4)), "k": jnp.ones((3, 4))}
    x = jnp.ones((2, 3))
    (group,) = jaxprune.trace(rotary, params, x).values()
    assert group.ordered
    keep = {group.name: np.arange(4) < 2}
    proof = jaxprune.plans.verify(rotary, params, x, keep=keep, key=key)
    assert proof.narrowed < 2e-5
    assert group.name not in proof.permuted


def test_verify_refuses_an_inexact_plan_and_says_where(key):
    def gate(params, x):
        table = jnp.arange(4.0)[None]
        return jax.nn.softmax(x @ params["w1"] + table) @ params["w2"]

    params = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 2))}
    keep = {"w1:1": np.arange(4) < 2}
    with pytest.raises(ValueError, match=r"differs.*w1:1: .*reduce_max at test_plans"):
        jaxprune.plans.verify(gate, params, jnp.ones((2, 3)), keep=keep, key=key)


def test_verify_catches_units_that_are_not_interchangeable(key, monkeypatch):
    params = {"q": jnp.ones((3, 4)), "k": jnp.ones((3, 4))}
    for module in ("jaxprune.recipes.plans", "jaxprune.surgery._permuting"):
        monkeypatch.setattr(f"{module}.can_permute", lambda group: True)
    with pytest.raises(ValueError, match="reordering the units of"):
        jaxprune.plans.verify(
            rotary, params, jnp.ones((2, 3)), keep={"q:1": np.arange(4) < 2}, key=key
        )
