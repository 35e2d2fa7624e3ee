import json
import pathlib
import subprocess
import sys
import zipfile
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import io
from jaxprune.io._folders import sealed
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


def test_tells_nothing_about_the_machine_that_made_it(folder):
    """JAX keeps the line of the source of every operation: of its path, the name alone."""
    contents = b"".join(file.read_bytes() for file in folder.rglob("*.*"))
    assert b"test_export.py" in contents, "or the check could not fail"
    for place in (pathlib.Path(__file__).parent, pathlib.Path(jax.__file__).parent):
        assert str(place).encode() not in contents
    assert str(pathlib.Path.home()).encode() + b"/" not in contents
    assert jax.config.jax_hlo_source_file_canonicalization_regex is None


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


def test_leaves_may_have_any_name(tmp_path):
    names = ["file", "allow_pickle", "w", "w.npy", "../up", "args", "a b", "ü"]
    variables = {name: jnp.full(2, float(i)) for i, name in enumerate(names)}
    save_exported(
        tmp_path, lambda v, x: x + v["file"][None], variables, jnp.ones((1, 2))
    )
    found = load_exported(tmp_path).variables
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    twice = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"named a/b: \['a'\]\['b'\] and \['a/b'\]"):
        save_exported(tmp_path, lambda v, x: x, twice, jnp.ones((1, 2)))


def double(variables, x):
    return x * variables["w"][None]


@pytest.fixture
def small_folder(tmp_path):
    folder = tmp_path / "model"
    save_exported(folder, double, {"w": jnp.ones(3)}, jnp.ones((1, 3)))
    return folder


def resealed(folder, **changes):
    """Changes what model.json says as somebody would who can compute a CRC."""
    about = json.loads((folder / "model.json").read_text())
    for name, facts in changes.items():
        about[name] = {**about[name], **facts}
    (folder / "model.json").write_text(json.dumps(sealed(about)))


@pytest.mark.parametrize(
    "name", ["/dev/zero", "../model/model.json", "model.json", "."]
)
def test_only_its_own_files_are_read(small_folder, name):
    facts = {"name": name, "bytes": 0, "crc32": 0}
    resealed(small_folder, files={"parameters.npz": facts})
    with pytest.raises(
        ValueError, match=f"{name} is not a valid name for parameters.npz"
    ):
        load_exported(small_folder)


@pytest.mark.parametrize("file", ["model.json", "function.jaxexport", "parameters.npz"])
def test_devices_are_not_read(small_folder, file):
    (small_folder / file).unlink()
    (small_folder / file).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=f"damaged: {file} is not a regular file"):
        load_exported(small_folder)


def test_parameters_that_unpack_to_more_are_not_unpacked(small_folder):
    path = small_folder / "parameters.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", bytes(10**7))
    about = {"name": path.name, "bytes": path.stat().st_size}
    about["crc32"] = zlib.crc32(path.read_bytes())
    resealed(small_folder, files={"parameters.npz": about})
    with pytest.raises(ValueError, match="damaged: w has 10000000 bytes, not 12"):
        load_exported(small_folder)


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[1]", "{}", "[" * 10**5, '{"a": NaN}']
)
def test_what_is_no_description_is_refused(small_folder, text):
    (small_folder / "model.json").write_text(text)
    with pytest.raises(ValueError, match="is damaged: .*"):
        load_exported(small_folder)


def test_an_export_is_compared_before_it_is_written(small_folder):
    def centred(variables, x):
        return x - x.mean(0, keepdims=True)

    with pytest.raises(
        ValueError, match="differs from .* by 1.0e.00 .*nothing was writ"
    ):
        save_exported(small_folder, centred, {}, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="the batch, but args/0 has 2, args/1 has 3"):
        save_exported(small_folder, lambda v, x, y: x, {}, jnp.ones(2), jnp.ones(3))
    np.testing.assert_array_equal(
        load_exported(small_folder)(jnp.ones((1, 3))), [[1] * 3]
    )
    save_exported(small_folder, double, {"w": jnp.full(3, 2.0)}, jnp.ones((1, 3)))
    np.testing.assert_array_equal(
        load_exported(small_folder)(jnp.ones((1, 3))), [[2] * 3]
    )
    assert len(list(small_folder.iterdir())) == 4


@pytest.fixture
def weights(tmp_path):
    variables = {
        "a": (jnp.arange(6.0).reshape(2, 3), [jnp.ones((), jnp.bfloat16), None]),
        "file": np.arange(3, dtype=np.float64),
        "empty": jnp.zeros((0, 2), jnp.int8),
    }
    path = tmp_path / "weights.safetensors"
    io.save_safetensors(path, variables, plan={"format": 1}, facts={"accuracy": 0.5})
    return path, variables


def test_safetensors_come_back(weights):
    path, variables = weights
    found = io.load_safetensors(path)
    assert jax.tree.structure(found.variables) == jax.tree.structure(variables)
    for one, other in zip(
        jax.tree.leaves(found.variables), jax.tree.leaves(variables), strict=True
    ):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert found[1:] == ({"format": 1}, {"accuracy": 0.5})
    with pytest.raises(ValueError, match="w has dtype int4, unknown to safetensors"):
        io.save_safetensors(path, {"w": jnp.ones(2, jnp.int4)})
    with pytest.raises(ValueError, match="keeps the name __metadata__ for itself"):
        io.save_safetensors(path, {"__metadata__": jnp.ones(2)})
    assert io.load_safetensors(path).facts == {"accuracy": 0.5}


def test_safetensors_of_other_programs_are_flat(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    library.save_file({"a/b": np.ones(2, np.float32)}, tmp_path / "w")
    variables, plan, facts = io.load_safetensors(tmp_path / "w")
    assert (list(variables), plan, facts) == (["a/b"], None, {})


def test_every_damaged_byte_of_safetensors_is_noticed(weights):
    path, _ = weights
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(content), 40):
        for changed in (
            content[:at]
            + bytes([content[at] ^ 1 << rng.integers(8)])
            + content[at + 1 :],
            content[:at],
        ):
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=r"weights\.safetensors is damaged"):
                io.load_safetensors(path)


@pytest.mark.parametrize(
    ("save", "package", "extra"),
    [
        (io.save_tflite, "tensorflow", "tflite"),
        (io.save_onnx, "jax2onnx", "onnx"),
        (io.save_safetensors, "safetensors", "export"),
    ],
)
def test_a_missing_converter_is_told_with_its_extra(
    tmp_path, monkeypatch, save, package, extra
):
    for name in [package, f"{package}.numpy"]:
        monkeypatch.setitem(sys.modules, name, None)
    args = () if extra == "export" else (jnp.ones((1, 3)),)
    words = ({"w": jnp.ones(3)},) if extra == "export" else (double, {"w": jnp.ones(3)})
    with pytest.raises(
        ModuleNotFoundError, match=rf"pip install 'jaxprune\[{extra}\]'"
    ):
        save(tmp_path / "it", *words, *args)
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize(
    ("save", "packages"),
    [
        (io.save_tflite, ["tensorflow", "ai_edge_litert"]),
        (io.save_onnx, ["jax2onnx", "onnxruntime"]),
    ],
    ids=["tflite", "onnx"],
)
@pytest.mark.filterwarnings("default")
def test_converters_compute_the_same_or_write_nothing(pruned, tmp_path, save, packages):
    for package in packages:  # heavy: see the extras in pyproject.toml
        pytest.importorskip(package, reason=f"{package} is not installed")
    save(tmp_path / "model", pruned[0], pruned[1], np.zeros((2, 8, 8, 3), np.float32))
    assert (tmp_path / "model").stat().st_size > 1000
    with pytest.raises(ValueError, match="differs from the function it was made from"):
        save(
            tmp_path / "no",
            lambda v, x: x - x.mean(0, keepdims=True),
            {},
            np.ones((2, 3), np.float32),
        )
    with pytest.raises(ValueError, match="the converter failed, so nothing was"):
        save(
            tmp_path / "no",
            lambda v, x: jnp.fft.fft(x),
            {},
            np.ones((2, 8), np.float32),
        )
    assert not (tmp_path / "no").exists()
