import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.image_classification import cifar, mnist

from jaxprune import data
from jaxprune.data import _archives as archives
from jaxprune.data import _loading as loading
from jaxprune.data import _pipeline as pipeline
from jaxprune.data import _scenes as scenes
from jaxprune.data import _synthetic as synthetic
from jaxprune.data._digits import Digits

pytestmark = pytest.mark.once

OFFLINE = [name for name, spec in data.DATASETS.items() if not spec.sources]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def load(folder):
    return functools.cache(functools.partial(data.load, data_dir=folder))


def multiset(images, labels):
    return sorted(
        (np.ascontiguousarray(image).tobytes(), np.asarray(label, np.int32).tobytes())
        for image, label in zip(images, labels, strict=True)
    )


def examples(dataset):
    return multiset(dataset.images, dataset.labels)


# ------------------------------------------------------------------ loading


@pytest.mark.once
@pytest.mark.parametrize("name", OFFLINE)
def test_normalised_training_images_have_mean_0_and_deviation_1(load, name):
    train = load(name, "train")
    sums = np.zeros((2, train.spec.image_shape[-1]))
    for start in range(0, len(train), 2000):
        part = data.normalize(train.images[start : start + 2000], train.spec)
        assert part.dtype == jnp.float32
        part = np.asarray(part, np.float64)
        sums += [part.sum((0, 1, 2)), (part**2).sum((0, 1, 2))]
    mean, square = sums / (len(train) * np.prod(train.spec.image_shape[:2]))
    np.testing.assert_allclose(mean, 0, atol=1e-3)
    np.testing.assert_allclose(np.sqrt(square - mean**2), 1, atol=1e-3)


@pytest.mark.once
@pytest.mark.parametrize("name", OFFLINE)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_is_what_its_spec_says(load, name, split):
    dataset = load(name, split)
    spec = data.DATASETS[name]
    assert dataset.spec is spec
    assert dataset.images.shape == (len(dataset), *spec.image_shape)
    assert dataset.images.dtype == np.uint8
    assert dataset.labels.dtype == np.int32
    assert dataset.labels.shape == (len(dataset), *spec.label_shape)
    assert set(dataset.labels.ravel().tolist()) == set(range(spec.num_classes))
    with pytest.raises(ValueError, match="read-only"):
        dataset.images[0] = 0


@pytest.mark.once
def test_digits_are_scikit_learns(load):
    train, test = load("digits", "train"), load("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    original = load_digits()
    ours = np.concatenate([train.images, test.images])[..., 0]
    back = np.round(ours * (16 / 255)).astype(np.uint8)
    assert ours.max() == 255
    assert multiset(back, np.concatenate([train.labels, test.labels])) == multiset(
        original.images.astype(np.uint8), original.target
    )


@pytest.mark.once
def test_digits_split_is_stratified_and_fixed(load):
    test = load("digits", "test")
    share = np.bincount(load_digits().target) * (360 / 1797)
    assert np.all(np.abs(np.bincount(test.labels) - share) < 1)
    content = test.images.tobytes() + test.labels.tobytes()
    assert hashlib.sha256(content).hexdigest()[:12] == "c58a56c6a518"


@pytest.mark.once
def test_files_are_tfds_files_read_without_tensorflow(load, folder):
    test = load("digits", "test")
    home = folder / "digits" / "1.0.0"
    assert list(home.glob("digits-test.array_record-*"))
    source = tfds.builder_from_directory(home).as_data_source("test")
    for row in (0, 359):
        np.testing.assert_array_equal(source[row]["image"], test.images[row])
        assert source[row]["label"] == test.labels[row]
    assert "tensorflow" not in sys.modules


@pytest.mark.once
def test_a_sliced_split_is_a_partition(load):
    first, second = load("digits", "train[:90%]"), load("digits", "train[90%:]")
    assert (len(first), len(second)) == (1293, 144)
    both = sorted(examples(first) + examples(second))
    assert both == examples(load("digits", "train"))
    assert len(np.unique(second.labels)) == 10


@pytest.mark.once
def test_reading_joins_its_parts(load, folder, monkeypatch):
    monkeypatch.setattr(loading, "_READ_AT_ONCE", 100)
    again = data.load("digits", "test", data_dir=folder)
    np.testing.assert_array_equal(again.images, load("digits", "test").images)
    np.testing.assert_array_equal(again.labels, load("digits", "test").labels)


@pytest.mark.once
def test_of_two_processes_that_prepare_the_later_uses_the_earlier(
    load, tmp_path, monkeypatch
):
    prepare = Digits._split_generators
    calls = []

    def overtaken(builder, dl_manager):
        calls.append(builder)
        if len(calls) == 1:
            data.load("digits", "test", data_dir=tmp_path)
        return prepare(builder, dl_manager)

    monkeypatch.setattr(Digits, "_split_generators", overtaken)
    late = data.load("digits", "test", data_dir=tmp_path)
    assert len(calls) == 2
    assert examples(late) == examples(load("digits", "test"))
    assert [p.name for p in (tmp_path / "digits").iterdir()] == ["1.0.0"]


@pytest.mark.once
def test_a_failed_preparation_is_not_taken_for_another_process(tmp_path, monkeypatch):
    def fail(builder, dl_manager):
        raise OSError("No space left on device")

    monkeypatch.setattr(Digits, "_split_generators", fail)
    with pytest.raises(OSError, match="No space left"):
        data.load("digits", "test", data_dir=tmp_path)


@pytest.mark.once
def test_data_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXPRUNE_DATA", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert loading.data_folder() == tmp_path / ".cache" / "jaxprune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert loading.data_folder() == tmp_path / "cache" / "jaxprune"
    monkeypatch.setenv("JAXPRUNE_DATA", "~/sets")
    assert loading.data_folder() == tmp_path / "sets"
    assert loading.data_folder(tmp_path / "here") == tmp_path / "here"


@pytest.mark.once
def test_importing_needs_no_tfds():
    code = "import jaxprune.data, sys; print('tensorflow_datasets' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


@pytest.mark.once
def test_error_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "jaxprune.data._digits")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    text = r"^digits needs tensorflow_datasets: pip install 'jaxprune\[experiments\]'$"
    with pytest.raises(ModuleNotFoundError, match=text):
        data.load("digits", "test", data_dir=tmp_path)


@pytest.mark.once
def test_error_for_an_unknown_name():
    text = r"no data set 'cifar-10'; there are digits, .*cifar100; did you mean 'cifar1"
    with pytest.raises(ValueError, match=text):
        data.load("cifar-10", "train")
    with pytest.raises(ValueError, match=r"no data set 'xyz'; there are .*cifar100$"):
        data.load("xyz", "train")


@pytest.mark.once
def test_error_for_an_unknown_or_empty_split(load):
    with pytest.raises(ValueError, match="Unknown split 'valid'"):
        load("digits", "valid")
    with pytest.raises(ValueError, match=r"^split 'train\[:0\]' of digits holds no ex"):
        load("digits", "train[:0]")


# ----------------------------------------------------------------- shapes32


@pytest.mark.once
def test_shapes32_is_large_balanced_and_has_no_test_image_in_training(load):
    train, test = load("shapes32", "train"), load("shapes32", "test")
    assert np.bincount(train.labels).tolist() == [1000] * 16
    assert np.bincount(test.labels).tolist() == [250] * 16
    images = np.concatenate([train.images, test.images])
    assert len({image.tobytes() for image in images}) == 20_000


@pytest.mark.once
def test_shapes32_files_hold_what_the_seed_draws(load):
    rng = np.random.default_rng((20_240, 1, 3))
    labels = np.arange(3000, 4000) % 16
    drawn = multiset(synthetic.draw(labels, rng), labels)
    assert not set(drawn) - set(examples(load("shapes32", "test")))


@pytest.mark.once
def test_shapes32_label_is_neither_colour_nor_linear(load):
    train, test = load("shapes32", "train[:6000]"), load("shapes32", "test")

    def least_squares_accuracy(features):
        x, y = features(train.images), np.eye(16)[train.labels]
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)
        x = features(test.images)
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        return np.mean((x @ weights).argmax(1) == test.labels)

    def colour(images):
        pixels = images.reshape(len(images), -1, 3) / 255.0
        return np.concatenate([pixels.mean(1), pixels.std(1)], axis=1)

    def coarse_pixels(images):
        pixels = images.reshape(len(images), 8, 4, 8, 4, 3) / 255.0
        return pixels.mean((2, 4, 5)).reshape(len(images), -1)

    chance, standard_error = 1 / 16, np.sqrt(15 / 16**2 / 4000)
    assert least_squares_accuracy(coarse_pixels) < chance + 4 * standard_error
    # Contrast tells plain from patterned textures a little.
    assert least_squares_accuracy(colour) < 2.5 * chance


@pytest.mark.once
@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("disc", np.pi * 0.82**2),
        ("square", 1.44**2),
        ("triangle", 3 * np.sqrt(3) * 0.5**2),
        ("cross", 2 * 1.9 * 0.64 - 0.64**2),
    ],
)
def test_shapes32_outline_encloses_its_area(shape, area):
    line = (np.arange(1000) + 0.5) / 400 - 1.25
    inside = synthetic._OUTLINES[shape](line[None], line[:, None]) < 0
    np.testing.assert_allclose(inside.mean() * 2.5**2, area, rtol=5e-3)


@pytest.mark.once
def test_shapes32_labels_differ_where_they_say():
    def draw(name):
        shape, texture = name.split("/")
        label = 4 * synthetic.SHAPES.index(shape) + synthetic.TEXTURES.index(texture)
        return synthetic.draw(np.full(200, label), np.random.default_rng(0))

    def changed(one, other):
        return np.mean(np.any(draw(one) != draw(other), axis=-1), axis=(1, 2))

    # Where only the texture changes, nothing outside the shape does: at most the
    # area of the largest one, of an image of area 4, and the soft pixel around it.
    assert np.all(changed("disc/stripes", "disc/checks") < np.pi * 0.8**2 / 4)
    assert np.all(changed("disc/stripes", "disc/checks") > 0.05)
    # Disc and square share most of their inside, disc and cross less of it.
    square = changed("disc/dots", "square/dots").mean()
    cross = changed("disc/dots", "cross/dots").mean()
    assert 0.01 < square < cross


# ------------------------------------------------------------------------- scenes


def test_scenes_files_hold_what_the_seed_draws(load):
    rng = np.random.default_rng((20_241, 1, 1))
    drawn = multiset(*scenes.draw(500, rng))
    assert not set(drawn) - set(examples(load("scenes", "test")))


def test_a_scene_has_its_labels_where_its_objects_are():
    images, labels = scenes.draw(300, np.random.default_rng(0))
    objects = [len(set(label[label > 0].tolist())) for label in labels]
    assert min(objects) >= 1 and max(objects) <= 4
    # Steps in brightness are more frequent along the outlines of labels.
    grey = images.astype(float).mean(-1)
    steps, outline = np.abs(np.diff(grey, axis=2)), np.diff(labels, axis=2) != 0
    assert steps[outline].mean() > 1.5 * steps[~outline].mean()


# ----------------------------------------------------------------- archives


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A folder and the address where it is served."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    root = tmp_path / "web"
    root.mkdir()
    handler = functools.partial(Silent, directory=root)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield root, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture
def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_cifar(path, folder, files, label_bytes, rng):
    """Writes an archive in the official layout; returns images and labels."""
    made = {}
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            if isinstance(content, int):
                images = rng.integers(0, 256, (content, 32, 32, 3), np.uint8)
                labels = rng.integers(0, 10, (content, label_bytes), np.uint8)
                made[name] = images, labels[:, -1]
                content = b"".join(
                    label.tobytes()
                    + b"".join(image[..., c].tobytes() for c in range(3))
                    for image, label in zip(images, labels, strict=True)
                )
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return made


CIFAR10_FILES = {
    "batches.meta.txt": b"".join(b"kind%d\n" % i for i in range(10)) + b"\n",
    **{f"data_batch_{i}.bin": 3 for i in range(1, 6)},
    "test_batch.bin": 4,
    "readme.html": b"<html>",
}
CIFAR100_FILES = {
    "coarse_label_names.txt": b"".join(b"coarse_%d\n" % i for i in range(20)),
    "fine_label_names.txt": b"".join(b"fine_%d\n" % i for i in range(100)),
    "train.bin": 6,
    "test.bin": 2,
}


@pytest.fixture
def cifar10_web(web, monkeypatch):
    root, address = web
    made = write_cifar(
        root / "ten.tar.gz",
        "cifar-10-batches-bin",
        CIFAR10_FILES,
        1,
        np.random.default_rng(0),
    )
    monkeypatch.setattr(archives.Cifar10, "SOURCES", (address + "ten.tar.gz",))
    return made


@pytest.mark.once
def test_cifar10_is_prepared_without_tensorflow(cifar10_web, tmp_path):
    train = data.load("cifar10", "train", data_dir=tmp_path)
    test = data.load("cifar10", "test", data_dir=tmp_path)
    parts = [cifar10_web[f"data_batch_{i}.bin"] for i in range(1, 6)]
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    assert examples(train) == multiset(images, labels)
    assert examples(test) == multiset(*cifar10_web["test_batch.bin"])
    assert "tensorflow" not in sys.modules


@pytest.mark.once
def test_the_stock_builder_reads_our_files(cifar10_web, tmp_path):
    test = data.load("cifar10", "test", data_dir=tmp_path)
    stock = cifar.Cifar10(data_dir=tmp_path, file_format="array_record")
    source = stock.as_data_source("test")
    assert stock.info.features["label"].names == [f"kind{i}" for i in range(10)]
    ours = archives.Cifar10(data_dir=tmp_path / "other").info.features
    assert set(ours) == set(stock.info.features)
    assert sorted(source[i]["id"] for i in range(4)) == [
        b"test_0000%d" % i for i in range(4)
    ]
    for row in range(4):
        np.testing.assert_array_equal(source[row]["image"], test.images[row])


@pytest.mark.once
def test_cifar100_keeps_the_fine_label(web, tmp_path, monkeypatch):
    root, address = web
    rng = np.random.default_rng(1)
    made = write_cifar(
        root / "hundred.tar.gz", "cifar-100-binary", CIFAR100_FILES, 2, rng
    )
    monkeypatch.setattr(archives.Cifar100, "SOURCES", (address + "hundred.tar.gz",))
    train = data.load("cifar100", "train", data_dir=tmp_path)
    assert examples(train) == multiset(*made["train.bin"])
    names = cifar.Cifar100(data_dir=tmp_path).info.features["label"].names
    assert names == [f"fine_{i}" for i in range(100)]


def write_idx(path, array):
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.mark.once
def test_mnist_is_prepared_without_tensorflow(web, tmp_path, monkeypatch):
    root, address = web
    rng = np.random.default_rng(2)
    made = {}
    for split, count in (("train", 7), ("t10k", 5)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = rng.integers(0, 10, count).astype(np.uint8)
        write_idx(root / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(root / f"{split}-labels-idx1-ubyte.gz", labels)
        made[split] = multiset(images, labels)
    names = [url.rsplit("/", 1)[1] for url in data.DATASETS["mnist"].sources]
    sources = tuple(address + name for name in names)
    monkeypatch.setattr(archives.Mnist, "SOURCES", sources)
    for split, count in (("train", 7), ("test", 5)):
        dataset = data.load("mnist", split, data_dir=tmp_path)
        assert dataset.images.shape == (count, 28, 28, 1)
        assert examples(dataset) == made["train" if split == "train" else "t10k"]


@pytest.fixture
def fashion(monkeypatch, tmp_path):
    """``folder -> split -> examples``: writes tiny archives that the builder accepts."""
    monkeypatch.setattr(archives.FashionMnist, "FOLDERS", (str(tmp_path / "debian"),))
    monkeypatch.setattr(loading, "_TIMEOUT_S", 0.2)

    def refuse(*args, **kwargs):
        raise requests.ConnectionError("no network here")

    monkeypatch.setattr("requests.head", refuse)

    def write(folder, seed=3):
        folder.mkdir(parents=True)
        rng, made, contents = np.random.default_rng(seed), {}, {}
        for split, count in (("train", 7), ("t10k", 5)):
            images = rng.integers(0, 256, (count, 28, 28), np.uint8)
            labels = rng.integers(0, 10, count).astype(np.uint8)
            for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
                path = folder / f"{split}-{kind}-ubyte.gz"
                write_idx(path, array)
                content = gzip.decompress(path.read_bytes())
                contents[path.name] = hashlib.sha256(content).hexdigest()
            made["train" if split == "train" else "test"] = multiset(images, labels)
        monkeypatch.setattr(archives.FashionMnist, "CONTENTS", contents)
        return made

    return write


@pytest.mark.once
@pytest.mark.parametrize(
    "place", ["debian", "downloads/manual", "manual/fashion_mnist"]
)
def test_fashion_mnist_is_found_where_it_lies(fashion, tmp_path, place):
    place = place.replace("manual/f", "downloads/manual/f")
    mnist_of_that_name = tmp_path / "downloads" / "manual"
    if place.endswith("fashion_mnist"):
        fashion(mnist_of_that_name, seed=4)  # other content: passed over
        (mnist_of_that_name / "t10k-labels-idx1-ubyte.gz").write_bytes(b"<html>")
    made = fashion(tmp_path / place)
    for split, count in (("train", 7), ("test", 5)):
        dataset = data.load("fashion_mnist", split, data_dir=tmp_path)
        assert dataset.images.shape == (count, 28, 28, 1)
        assert examples(dataset) == made[split]


@pytest.mark.once
def test_without_fashion_mnist_one_line_says_where_it_comes_from(fashion, tmp_path):
    fashion(tmp_path / "elsewhere")
    with pytest.raises(ConnectionError) as caught:
        data.load("fashion_mnist", "train", data_dir=tmp_path)
    assert str(caught.value) == (
        f"fashion_mnist is not prepared in {tmp_path} and "
        "fashion-mnist.s3-website.eu-central-1.amazonaws.com does not answer "
        "(ConnectionError): put train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz,"
        " t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz into "
        f"{tmp_path}/downloads/manual, or install Debian's dataset-fashion-mnist, or "
        "load it once where there is a network and pass that folder as data_dir; "
        "without any download there are digits, shapes32, scenes"
    )


@pytest.mark.once
def test_idx_reader_refuses_another_file(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(b"<html>not found</html>"))
    with pytest.raises(ValueError, match=r"ubyte\.gz starts with b'<ht', an IDX file"):
        archives.read_idx(path)


@pytest.mark.once
def test_archives_are_read_up_to_a_limit(tmp_path):
    path = tmp_path / "images.gz"
    write_idx(path, np.zeros((100, 100, 100), np.uint8))  # a kilobyte on disk
    assert archives.read_idx(path, most=1_000_016).shape == (100, 100, 100)
    with pytest.raises(ValueError, match=r"images\.gz has more than 1000015 bytes"):
        archives.read_idx(path, most=1_000_015)
    path = tmp_path / "batches.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for folder in ("a", "b"):
            member = tarfile.TarInfo(f"{folder}/batch_{folder}")
            member.size = 1_000
            archive.addfile(member, io.BytesIO(bytes(1_000)))
    assert {k: len(v) for k, v in archives.read_tar(path, most=2_000).items()} == {
        "batch_a": 1_000,
        "batch_b": 1_000,
    }
    with pytest.raises(ValueError, match=r"damaged: its files have more than 1999"):
        archives.read_tar(path, most=1_999)
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("a/batch"))
        archive.addfile(tarfile.TarInfo("b/batch"))
    with pytest.raises(ValueError, match="two of its files are named batch"):
        archives.read_tar(path)


def idx(*header, content=b""):
    return gzip.compress(b"\0\0\x08" + bytes(header) + content)


@pytest.mark.once
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "an IDX file"),
        (gzip.compress(b"x" * 1000)[:-9], "is damaged"),
        (b"no gzip", "is damaged: Not a gzipped file"),
        (idx(), r"behind a header|an IDX"),
        (idx(1, 0, 0, 0, 3, content=b"ab"), r"2 bytes behind .* says \(3,\)"),
        (idx(1, 0, 0, 0, 3, content=b"abcd"), r"4 bytes behind .* says \(3,\)"),
        (idx(200, 0, 0, 0, 3), "bytes behind a header"),
        (idx(2, *b"\xff" * 8), r"says \(4294967295, 4294967295\)"),
    ],
    ids=range(8),
)
def test_damaged_archives_are_named(tmp_path, content, text):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"images\.gz .*({text})"):
        archives.read_idx(path)
    with pytest.raises(ValueError, match=r"images\.gz is damaged"):
        archives.read_tar(path)


@pytest.mark.once
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_specs_agree_with_the_stock_builders(name, tmp_path):
    spec = data.DATASETS[name]
    stock_class = {
        "mnist": mnist.MNIST,
        "fashion_mnist": mnist.FashionMNIST,
        "cifar10": cifar.Cifar10,
        "cifar100": cifar.Cifar100,
    }[name]
    stock = stock_class(data_dir=tmp_path)
    ours = loading._builder(spec, tmp_path)
    assert (ours.name, ours.version) == (stock.name, stock.version)
    assert stock.info.features["image"].shape == spec.image_shape
    assert stock.info.features["label"].num_classes == spec.num_classes
    # TFDS verifies archives whose address it knows.
    assert spec.sources == ours.SOURCES
    assert set(spec.sources) == set(stock.url_infos)


def unreachable(monkeypatch, port):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    address = f"http://127.0.0.1:{port}/cifar-10-binary.tar.gz"
    monkeypatch.setattr(archives.Cifar10, "SOURCES", (address,))


@pytest.mark.once
def test_error_without_a_network_comes_at_once(tmp_path, monkeypatch, closed_port):
    unreachable(monkeypatch, closed_port)
    begin = time.monotonic()
    with pytest.raises(ConnectionError) as caught:
        data.load("cifar10", "train", data_dir=tmp_path)
    assert time.monotonic() - begin < 10
    assert str(caught.value) == (
        f"cifar10 is not prepared in {tmp_path} and 127.0.0.1:{closed_port} does not "
        f"answer (ConnectionError): put cifar-10-binary.tar.gz into "
        f"{tmp_path}/downloads/manual, or load it once where there is a network and "
        f"pass that folder as data_dir; without any download there are digits, "
        f"shapes32, scenes"
    )
    assert not (tmp_path / "cifar10").exists()


@pytest.mark.once
def test_error_when_the_host_keeps_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        unreachable(monkeypatch, silent.getsockname()[1])
        with pytest.raises(ConnectionError, match=r"does not answer \(ReadTimeout\)"):
            data.load("cifar10", "train", data_dir=tmp_path)


@pytest.mark.once
def test_a_cached_archive_needs_no_network(cifar10_web, tmp_path, monkeypatch):
    first = data.load("cifar10", "test", data_dir=tmp_path)
    (tmp_path / "cifar10").rename(tmp_path / "lost")

    def refuse(*args, **kwargs):
        raise AssertionError("asked the network")

    monkeypatch.setattr("requests.head", refuse)
    monkeypatch.setattr("requests.Session.get", refuse)
    again = data.load("cifar10", "test", data_dir=tmp_path)
    assert examples(again) == examples(first)


@pytest.mark.once
def test_an_archive_put_by_hand_is_verified(tmp_path):
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    (manual / "cifar-10-binary.tar.gz").write_bytes(b"something else")
    with pytest.raises(NonMatchingChecksumError, match="wrong checksum"):
        data.load("cifar10", "train", data_dir=tmp_path)


# ----------------------------------------------------------------- pipeline


def tiny(count, name="digits"):
    spec = data.DATASETS[name]
    images = np.random.default_rng(0).integers(
        0, 256, (count, *spec.image_shape), np.uint8
    )
    return data.Dataset(spec, images, np.arange(count, dtype=np.int32) % 10)


def test_normalize_is_the_formula_on_every_rank():
    spec = data.DATASETS["cifar10"]
    images = tiny(3, "cifar10").images
    expected = np.empty(images.shape)
    for c in range(3):
        expected[..., c] = (images[..., c] / 255 - spec.mean[c]) / spec.std[c]
    out = jax.jit(data.normalize, static_argnames="spec")(images, spec=spec)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        data.normalize(images[0], spec), expected[0], rtol=1e-5, atol=1e-6
    )


def test_normalize_refuses_other_channels():
    with pytest.raises(
        ValueError, match=r"\(2, 8, 8, 1\) do not have the 3 channels of"
    ):
        data.normalize(tiny(2).images, data.DATASETS["cifar10"])


def test_crop_and_flip_against_a_loop():
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (40, 5, 7, 3), np.uint8)
    offsets = rng.integers(0, 7, (40, 2), np.int32)
    flips = rng.random(40) < 0.5
    expected = np.zeros_like(images)
    for n, row, column, c in itertools.product(range(40), range(5), range(7), range(3)):
        shown = 6 - column if flips[n] else column
        y, x = row + offsets[n, 0] - 3, shown + offsets[n, 1] - 3
        if 0 <= y < 5 and 0 <= x < 7:
            expected[n, row, column, c] = images[n, y, x, c]
    out = pipeline.crop_and_flip(
        jnp.asarray(images), jnp.asarray(offsets), jnp.asarray(flips), pad=3
    )
    assert out.dtype == jnp.uint8
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    "augmentation",
    [data.Augmentation(pad=1), data.Augmentation(pad=1, flip=True)],
    ids=["shift", "shift and flip"],
)
def test_augment_draws_every_shift_alike_and_alone(key, augmentation):
    spec = dataclasses.replace(data.DATASETS["digits"], augmentation=augmentation)
    image = np.arange(1, 65, dtype=np.uint8).reshape(8, 8, 1)
    count, seen = 3600, {}
    out = data.augment(np.broadcast_to(image, (count, 8, 8, 1)), key, spec)
    for drawn in np.asarray(out):
        seen[drawn.tobytes()] = seen.get(drawn.tobytes(), 0) + 1
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    possible = {}
    for flip, y, x in itertools.product([False, True], range(3), range(3)):
        if augmentation.flip or not flip:
            crop = padded[y : y + 8, x : x + 8]
            possible[(crop[:, ::-1] if flip else crop).tobytes()] = (flip, y, x)
    assert set(seen) == set(possible)
    # Each count is binomial; 5 standard deviations.
    rate = 1 / len(possible)
    spread = 5 * np.sqrt(count * rate * (1 - rate))
    assert max(abs(n - count * rate) for n in seen.values()) < spread


def test_augment_is_pure_and_depends_on_the_key(key):
    batch = tiny(64, "cifar10")
    draw = jax.jit(data.augment, static_argnames="spec")
    once = draw(batch.images, key, spec=batch.spec)
    np.testing.assert_array_equal(
        once, data.augment(batch.images, key, batch.spec), strict=True
    )
    other = draw(batch.images, jax.random.key(1), spec=batch.spec)
    same = np.all(np.asarray(once) == np.asarray(other), axis=(1, 2, 3))
    assert same.mean() < 0.1  # 1 in 162 by chance


def test_without_augmentation_images_come_back(key):
    batch = tiny(8)
    spec = dataclasses.replace(batch.spec, augmentation=data.Augmentation())
    np.testing.assert_array_equal(data.augment(batch.images, key, spec), batch.images)


def test_augment_refuses_one_image_and_other_shapes(key):
    text = r"shape \(8, 8, 1\) are not a batch of digits: expected \[N, 8, 8, 1\]"
    with pytest.raises(ValueError, match=text):
        data.augment(tiny(1).images[0], key, data.DATASETS["digits"])
    with pytest.raises(ValueError, match=r"\(1, 8, 8, 1\) are not a batch of mnist"):
        data.augment(tiny(1).images, key, data.DATASETS["mnist"])


def epoch_of(dataset, epoch, seed=0, drop_remainder=True):
    parts = data.batches(
        dataset, 10, seed=seed, epoch=epoch, drop_remainder=drop_remainder
    )
    return [part.tolist() for part in parts]


def test_an_epoch_holds_every_position_once():
    parts = epoch_of(tiny(103), 0, drop_remainder=False)
    assert [len(part) for part in parts] == [10] * 10 + [3]
    assert sorted(itertools.chain(*parts)) == list(range(103))
    assert list(itertools.chain(*parts)) != list(range(103))


def test_dropping_the_remainder_only_drops():
    dataset = tiny(103)
    assert epoch_of(dataset, 4) == epoch_of(dataset, 4, drop_remainder=False)[:-1]


def test_an_epoch_depends_on_seed_and_epoch_alone():
    dataset = tiny(103)
    orders = {
        (seed, epoch): epoch_of(dataset, epoch, seed)
        for seed, epoch in itertools.product(range(3), range(3))
    }
    for (seed, epoch), order in reversed(orders.items()):
        assert order == epoch_of(dataset, epoch, seed)
    distinct = {str(order) for order in orders.values()}
    assert len(distinct) == 9


def test_batch_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="batch_size=4 does not fit the 3 examples of"):
        data.batches(tiny(3), 4, seed=0, epoch=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        data.batches(tiny(3), 0, seed=0, epoch=0, drop_remainder=False)
    with pytest.raises(ValueError, match="batch_size=0"):
        data.eval_batches(tiny(3), 0)
    (only,) = data.batches(tiny(3), 4, seed=0, epoch=0, drop_remainder=False)
    assert sorted(only) == [0, 1, 2]


@pytest.mark.parametrize("count", [1, 9, 10, 11, 40])
def test_evaluation_counts_every_example_once_with_one_trace(count):
    dataset = tiny(count)
    traces = []

    @jax.jit
    def masked_sum(labels, mask):
        traces.append(labels.shape)
        return jnp.sum(jnp.where(mask, labels, 0))

    total, seen, examples_counted = 0, [], 0
    for index, mask in data.eval_batches(dataset, 10):
        total += int(masked_sum(dataset.labels[index], mask))
        seen += index[mask].tolist()
        examples_counted += mask.sum()
    assert seen == list(range(count))
    assert examples_counted == count
    assert total == sum(i % 10 for i in range(count))
    assert traces == [(10,)]
