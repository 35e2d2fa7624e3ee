"""The main job on nets of two layers: what it leaves, and how it resumes."""

import contextlib
import dataclasses
import functools
import importlib.machinery
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pages import BROWSER, Page, check_alone, check_seen, seen_by_a_browser

import jaxprune
from experiments.batch_bridgeout import report as batch_bridgeout_report
from experiments.batch_bridgeout import settings as batch_bridgeout_settings
from experiments.batch_bridgeout import study as batch_bridgeout
from experiments.batch_bridgeout.settings import decay_of, learning_rates, settings_for
from experiments.harness import measure, methods, quirks, runs, training
from experiments.harness.methods import FRACTIONS, METHODS, Hyper
from jaxprune.cli import _main as cli
from jaxprune.data import CLASSIFICATION, DATASETS, Dataset, load
from jaxprune.display import Picture
from jaxprune.io.export import load_exported
from jaxprune.models import MODELS, VGG, ResNet, ViT, vgg_widths

pytestmark = pytest.mark.once

TINY = functools.partial(VGG, widths=(4, "M", 6))
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "batch_bridgeout.ipynb"
HYPER = Hyper(0.1, 1e-3, rate=0.3, target=0.75, q=1.5)
TINY_RESNET = functools.partial(ResNet, stage_sizes=(1, 1), widths=(4, 6))


@pytest.fixture(scope="module")
def digits():
    """Dark images of label 0, bright ones of label 1."""
    labels = np.arange(96, dtype=np.int32) % 2
    noise = np.random.default_rng(0).integers(0, 100, (96, 8, 8, 1))
    images = noise + 150 * labels[:, None, None, None]
    return Dataset(DATASETS["digits"], images.astype(np.uint8), labels)


@pytest.fixture(scope="module")
def resnet():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "MODELS", {"tiny": TINY_RESNET})
        return methods.subject("tiny", DATASETS["digits"])


@pytest.fixture(scope="module")
def vgg():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "MODELS", {"tiny": TINY})
        return methods.subject("tiny", DATASETS["digits"])


@pytest.fixture(scope="module")
def train(vgg, digits):
    """``(folder, epochs, tick) -> state``, compiled once."""
    tx = methods.optimizer("bridgeout", HYPER, 0.1)
    step = training.make_step(vgg.net.apply, tx, digits, jaxprune.noisy_params)
    begin = training.start(vgg.init, tx, digits, 3)

    def run(folder, epochs, tick=lambda: None):
        how = training.Fit(epochs, 32, 5, folder, save_every_s=0.0)
        return training.fit(step, begin, digits, how, tick)

    return run


def initial(subject, seed=0):
    image = jnp.zeros((1, 8, 8, 1))
    return jax.device_get(subject.init(jax.random.key(seed), image))


# ----------------------------------------------------------------------------- the cut


def test_a_filter_is_rated_by_all_kernels_that_write_it(resnet):
    params = initial(resnet)["params"]
    found = methods.filter_norms(resnet.groups, params)
    writers = {
        "params/conv1/kernel:3": ["conv1", "block0_0/conv2"],
        "params/block0_0/conv1/kernel:3": ["block0_0/conv1"],
        "params/block1_0/conv1/kernel:3": ["block1_0/conv1"],
        "params/block1_0/conv2/kernel:3": ["block1_0/conv2", "block1_0/shortcut_conv"],
    }
    assert found.keys() == writers.keys()
    for name, paths in writers.items():
        squares = 0
        for path in paths:
            leaf = functools.reduce(
                lambda tree, part: tree[part], path.split("/"), params
            )
            squares = squares + (leaf["kernel"] ** 2).sum((0, 1, 2))
        np.testing.assert_allclose(found[name], np.sqrt(squares), rtol=1e-6)


def test_the_same_share_of_every_layer_goes(resnet):
    params = initial(resnet)["params"]
    norms = methods.filter_norms(resnet.groups, params)
    for tenths, fraction in enumerate(FRACTIONS):
        keep = methods.lowest_filters(resnet.groups, params, fraction)
        for name, group in resnet.groups.items():
            gone = group.size * tenths // 10  # exact in integers
            assert (~keep[name]).sum() == gone
            lowest = set(np.argsort(norms[name])[:gone].tolist())
            assert set(np.flatnonzero(~keep[name]).tolist()) == lowest


def test_a_wrong_slice_is_an_error():
    logits = np.array([[1.0, -50.0]])
    assert measure.difference(logits + 1e-4, logits) == pytest.approx(1e-4 / 50)
    with pytest.raises(ArithmeticError, match=r"differs .* by 0\.02 of its largest"):
        measure.difference(logits + 1.0, logits)
    with pytest.raises(ArithmeticError):
        measure.difference(logits * np.nan, logits)


def test_latency_tells_slow_from_fast():
    found = measure.latency_ms(
        {"slow": lambda: time.sleep(0.02), "fast": lambda: None}, seconds=0.05
    )
    assert found["slow"] >= 20 > 10 > found["fast"]


# ---------------------------------------------------------------------------- training


def test_the_optimiser_is_clipped_nesterov_with_decay():
    tx = methods.optimizer("weight_decay", Hyper(0.1, 0.5), 0.1)
    params, grads = {"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([30.0, 40.0])}
    updates, _ = tx.update(grads, tx.init(params), params)
    decayed = np.array([3.0, 4.0]) + 0.5 * np.array([2.0, 0.0])  # clipped to norm 5
    np.testing.assert_allclose(updates["w"], -0.1 * (1 + 0.9) * decayed, rtol=1e-6)


def test_only_convolutions_get_noise(resnet):
    params = initial(resnet)["params"]
    tx = methods.optimizer("bridgeout", Hyper(0.1, 0.0, 0.5, 1.0, 1.0), 0.1)
    noisy = jaxprune.noisy_params(params, tx.init(params))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), params, noisy)
    shapes = jax.tree.map(lambda leaf: leaf.ndim == 4, params)
    assert moved == shapes


def test_training_goes_on_as_if_it_had_not_stopped(train, tmp_path):
    whole = train(None, 4)
    seen = []

    def stop_in_the_third():
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 4, stop_in_the_third)
    found = train(tmp_path, 4)
    assert int(found.step) == 4 * 3
    jax.tree.map(
        np.testing.assert_array_equal, found.variables, jax.device_get(whole.variables)
    )
    again = train(tmp_path, 4)  # nothing left to do
    jax.tree.map(np.testing.assert_array_equal, again.variables, found.variables)


def test_training_learns(train, vgg, digits):
    state = train(None, 12)
    logits = vgg.predict(state.variables, digits)
    assert training.accuracy(logits, digits) > 0.9  # chance is 0.5


def test_predictions_of_the_last_batch_are_not_padding(vgg, digits, monkeypatch):
    variables = initial(vgg)
    monkeypatch.setattr(training, "EVAL_BATCH", 40)  # 96 = 40 + 40 + 16
    x = (digits.images / 255 - digits.spec.mean[0]) / digits.spec.std[0]
    expected = vgg.net.apply(variables, jnp.asarray(x, jnp.float32))
    found = training.make_predict(vgg.net.apply)(variables, digits)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------ rounds


def test_epochs_are_counted_those_before_a_kill_at_once():
    told = []
    batch = batch_bridgeout.ticking(lambda step: step, 3, lambda: told.append("epoch"))
    assert [batch(step) for step in (7, 8, 9)] == [7, 8, 9]
    assert told == ["epoch"] * 4  # the third at step 7, the fourth at step 9


# ---------------------------------------------------------------------------- settings

ASK = {"seeds": None, "epochs": None, "batch_size": None, "rounds": None}


def test_quick_is_less_of_everything():
    full = settings_for("digits", quick=False, **ASK)
    quick = settings_for("digits", quick=True, **ASK)
    assert quick.seeds < full.seeds
    assert quick.epochs < full.epochs
    assert len(quick.models) == 1
    assert set(quick.fractions) < set(full.fractions)
    assert set(batch_bridgeout.SIZES_AT) <= set(quick.fractions)
    assert full.round_sparsities == (0.2, 0.4, 0.6, 0.8)


def test_quick_is_true_to_what_is_given():
    given = {"seeds": 5, "epochs": 40, "batch_size": 16, "rounds": 2}
    models = ("resnet_digits", "vgg_digits")
    found = settings_for("digits", models, quick=True, **given)
    assert (found.seeds, found.epochs, found.batch_size) == (5, 40, 16)
    assert len(found.round_sparsities) == 2
    assert found.models == models


@pytest.mark.parametrize("exposure", [None, 14.5])
def test_all_arms_decay_alike(exposure):
    """By the sum of learning rate * weight decay / (1 - momentum)."""
    found = settings_for("digits", quick=True, exposure=exposure, **ASK)
    steps = found.epochs * (1437 // found.batch_size)
    (decay,) = {hyper.weight_decay for hyper in found.hyper.values()}
    (peak,) = {hyper.learning_rate for hyper in found.hyper.values()}
    with jax.numpy_dtype_promotion("standard"):
        rates = learning_rates(found, peak, 1437 // found.batch_size)
        falls = np.array(jax.vmap(rates)(jnp.arange(steps)))
    assert falls.sum() * decay / 0.1 == pytest.approx(exposure or 5.0, rel=1e-4)


def test_the_paper_s_exposure_is_that_of_its_settings(cifar10):
    steps = 230 * (50_000 // 128)
    found = decay_of(14.5, learning_rates(cifar10, 0.1, 50_000 // 128), steps)
    assert found == pytest.approx(5e-4, rel=0.01)
    weaker = settings_for("cifar10", quick=False, exposure=7.25, **ASK)
    (weak,) = {hyper.weight_decay for hyper in weaker.hyper.values()}
    assert weak == pytest.approx(found / 2)


@pytest.fixture(scope="module")
def cifar10():
    return settings_for("cifar10", quick=False, **ASK)


def test_cifar_gets_the_papers_settings(cifar10):
    assert (cifar10.epochs, cifar10.batch_size, cifar10.seeds) == (230, 128, 3)
    hyper = cifar10.hyper["bridgeout_vgg16/bridgeout"]
    assert hyper == Hyper(0.1, 5e-4, rate=0.3, target=0.75, q=1.5)
    spec = DATASETS["cifar10"]
    assert (spec.augmentation.pad, spec.augmentation.flip) == (4, True)


def test_the_learning_rate_falls_as_in_the_paper(cifar10):
    rates = batch_bridgeout_settings.learning_rates(cifar10, 0.1, 390)
    with jax.numpy_dtype_promotion("standard"):
        for epoch in (0, 59, 60, 119, 120, 159, 160, 199, 200, 229):
            falls = sum(epoch >= after for after in (60, 120, 160, 200))
            for step in (390 * epoch, 390 * epoch + 389):
                assert float(rates(step)) == pytest.approx(0.1 * 0.2**falls)


def test_the_header_says_what_the_paper_s_run_costs(cifar10):
    """Multiply-adds of the VGG counted by hand."""
    vgg, side, before = 512 * 10, 32, 3
    for width in vgg_widths(16):
        if width == "M":
            side //= 2
            continue
        vgg, before = vgg + side**2 * 9 * before * width, width
    found = batch_bridgeout_settings.training_flops(cifar10, 50_000)
    images = 50_000 * 230 * 3 * 3
    assert found["bridgeout_vgg16"] == 3 * 2 * vgg * images
    exa = " ".join(batch_bridgeout.__doc__.split())
    vgg, resnet, wrn = (found[name] / 1e18 for name in cifar10.models)
    assert (
        f"{vgg:.2f} exaFLOP for the VGG, {resnet:.2f} for the ResNet, {wrn:.2f}" in exa
    )
    assert f"{(vgg + resnet + wrn) * 1e18 / 60e12 / 3600:.0f} hours on one A100" in exa


def test_the_paper_s_curves_lie_beneath_ours(tmp_path, finished):
    curves = json.loads(batch_bridgeout_report.PAPER.read_text())["curves"]
    for nets in curves.values():
        assert set(nets) == set(batch_bridgeout_settings.CIFAR["models"])
        for methods_ in nets.values():
            assert set(methods_) == set(METHODS)
            for curve in methods_.values():
                length = len(curve["cut"])
                assert curve["cut"] == list(range(0, 10 * length, 10))
                assert len(curve["accuracy"]) == len(curve["half_bar"]) == length
    # Section 5 of the paper: Batch Bridgeout costs accuracy uncut and wins at 20 %.
    for nets in curves.values():
        for net in nets.values():
            ours, decay = net["bridgeout"]["accuracy"], net["weight_decay"]["accuracy"]
            assert ours[0] < decay[0] and ours[2] > decay[2]

    results = read(finished)
    results["settings"] |= {"dataset": "cifar10", "quirks": ["kernels_alone"]}
    with pytest.MonkeyPatch.context() as patch:
        vgg = {"cifar10": {"tiny": curves["cifar10"]["bridgeout_vgg16"]}}
        patch.setattr(batch_bridgeout_report, "_published", lambda: vgg)
        nothing = Picture([], {}, True)
        patch.setattr(batch_bridgeout_report, "_picture", lambda results: nothing)
        page = batch_bridgeout_report.write_report(tmp_path, results).read_text()
        drawn = batch_bridgeout_report._curves(results, ["tiny"]).axes[0]
    assert "the paper" in page and "90.8" in page and "emits a constant" in page
    labels = drawn.get_legend_handles_labels()[1]
    assert "Batch Bridgeout, the paper" in labels


# ------------------------------------------------------------------------------ quirks


def test_momentum_starts_anew():
    tx = quirks.restarted(optax.trace(0.9, nesterov=True), 2)
    params = {"w": jnp.zeros(2)}
    state, whole = tx.init(params), []
    gradients = [{"w": jnp.array([k, -2.0 * k])} for k in (1.0, 2.0, 3.0, 4.0)]
    for grad in gradients:
        updates, state = tx.update(grad, state, params)
        whole.append(updates["w"])
    for start in (0, 2):  # each pair by a link of its own
        once = optax.trace(0.9, nesterov=True)
        state = once.init(params)
        for grad, found in zip(gradients[start:][:2], whole[start:], strict=False):
            updates, state = once.update(grad, state, params)
            np.testing.assert_allclose(found, updates["w"], rtol=1e-6)


def test_the_best_epoch_is_kept_whatever_is_run_again(tmp_path):
    scores = {1.0: 0.5, 2.0: 0.9, 3.0: 0.9, 4.0: 0.7}
    after = quirks.keep_best(tmp_path, lambda variables: scores[float(variables["w"])])
    for epoch in (1, 2, 3, 2, 3, 4):  # stopped after 3, went on from 1
        state = training.State({"w": jnp.float32(epoch)}, None, None, None)
        after(epoch, state)
    best = quirks.read_best(tmp_path, {"w": jnp.float32(0)})
    assert (best.step, best.meta, float(best.state["w"])) == (2, {"score": 0.9}, 2.0)


@pytest.mark.parametrize("chain", [False, True])
def test_cuts_as_in_the_authors_code(resnet, chain):
    variables = initial(resnet)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda w: rng.normal(size=w.shape) + 0 * w, variables)
    plain = methods.one_shot_masks(resnet, variables, 0.5)
    found = quirks.quirky_masks(
        variables, 0.5, {"kernels_alone", "scales_too"}, chain=chain, masks=plain
    )
    for path, leaf in jax.tree.leaves_with_path(variables["params"]):
        names = [entry.key for entry in path]
        mask = functools.reduce(lambda tree, name: tree[name], names, found["params"])
        scores = None
        if names[-1] == "kernel" and names[0] != "head":
            scores = [np.linalg.norm(leaf[..., o]) for o in range(leaf.shape[-1])]
        elif names[-1] == "scale" and (chain or names[-2] == "shortcut_bn"):
            scores = np.abs(leaf)
        expected = np.ones(leaf.shape, bool)
        if scores is not None:
            expected[..., np.argsort(scores)[: len(scores) // 2]] = False
        np.testing.assert_array_equal(np.broadcast_to(mask, leaf.shape), expected)
    alone = quirks.quirky_masks(
        variables, 0.5, {"scales_too"}, chain=chain, masks=plain
    )
    chex_equal = jax.tree.map(
        lambda a, b: np.array_equal(a, b), alone["batch_stats"], plain["batch_stats"]
    )
    assert all(jax.tree.leaves(chex_equal))


def test_kernels_are_told_by_name():
    """Attention's biases and the position embeddings of a ViT have axes to spare."""
    vit = ViT(num_classes=3, width=8, depth=1, num_heads=2, patch_size=4)
    image = jnp.zeros((1, 8, 8, 1))
    params = jax.eval_shape(vit.init, jax.random.key(0), image)["params"]
    chosen = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, yes in jax.tree.leaves_with_path(methods.hidden_kernels(params))
        if yes
    }
    attention = {
        f"block0/attention/{name}" for name in ("query", "key", "value", "out")
    }
    layers = {"patch_embed", "block0/mlp1", "block0/mlp2"} | attention
    assert chosen == {f"{layer}/kernel" for layer in layers}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--dataset", "digit"], "no data set 'digit'; did you mean digits?"),
        (["--models", "vgg_digit"], "no model 'vgg_digit'; did you mean vgg_digits?"),
        (
            ["--quirks", "kernel_alone"],
            "no quirk 'kernel_alone'; did you mean kernels_",
        ),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--batch-sise", "3"], "no option '--batch-sise'; did you mean --batch-size?"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, words, text):
    assert cli.main(["run", "batch_bridgeout", *words]) == 2
    assert text in (told := capsys.readouterr().err)
    assert told.count("\n") == 1


def test_every_default_model_exists():
    for name in CLASSIFICATION:
        settings = settings_for(name, quick=False, **ASK)
        assert set(settings.models) <= MODELS.keys()


# ------------------------------------------------------------------------ the main job

RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import test_experiment as t
t.use_tiny(setattr)
sys.exit(t.cli.main(["run", "batch_bridgeout", *t.WORDS, "--out", sys.argv[2]]))
"""
WORDS = ["--models", "tiny", "--seeds", "2", "--epochs", "2", "--rounds", "2"]
WORDS += ["--batch-size", "256"]


def use_tiny(put):
    """Makes "tiny" the name of a model, and cuts less often."""
    models = {"tiny": TINY}
    put(batch_bridgeout_settings, "FRACTIONS", FRACTIONS[:7:3])
    put(batch_bridgeout, "MODELS", models)
    put(methods, "MODELS", models)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    load("digits", "test", data_dir=folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@contextlib.contextmanager
def as_users_do():
    """JAX's own promotion rules: optax's schedules need them, in all threads."""
    names = ("jax_numpy_dtype_promotion", "jax_numpy_rank_promotion")
    strict = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, ("standard", "allow"), strict=True):
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in zip(names, strict, strict=True):
            jax.config.update(name, value)


@pytest.fixture(scope="module")
def finished(home, data_dir):
    with pytest.MonkeyPatch.context() as patch, as_users_do():
        use_tiny(patch.setattr)
        words = [*WORDS, "--data-dir", str(data_dir), "--out", str(home / "whole")]
        assert cli.main(["run", "batch_bridgeout", *words]) == 0
    return home / "whole"


def read(folder):
    return json.loads((folder / "results.json").read_text())


def test_what_a_run_leaves(finished):
    results = read(finished)
    records, settings = results["records"], results["settings"]
    assert settings["models"] == ["tiny"]
    assert results["machine"]["versions"]["jax"] == jax.__version__
    for method in METHODS:
        for seed in (0, 1):
            found = records[f"tiny/{method}/seed{seed}"]
            assert len(found["accuracy"]) == len(settings["fractions"])
            assert found["area"] == pytest.approx(np.mean(found["accuracy"]))
            assert max(found["difference"]) <= measure.TOLERANCE
    assert [row["sparsity"] for row in records["rounds"]] == [0.4, 0.8]
    sizes = records["sizes/tiny"]
    assert sizes[0]["parameters"] == parameters(4, 6)
    assert sizes[1]["parameters"] == parameters(
        3, 5
    )  # int(.3 * 4) = 1, int(.3 * 6) = 1
    gained = results["summary"]["area gained over"]["tiny"]["dropout"]
    pairs = [
        records[f"tiny/bridgeout/seed{s}"]["area"]
        - records[f"tiny/dropout/seed{s}"]["area"]
        for s in (0, 1)
    ]
    assert gained["mean"] == pytest.approx(np.mean(pairs))


def parameters(first, second):
    convolutions = 9 * first + first + 9 * first * second + second
    norms, head = 2 * (first + second), 10 * second + 10
    return convolutions + norms + head


def test_the_report_shows_the_numbers(finished):
    text = (finished / "report.html").read_text()
    results = read(finished)
    for label in ("Batch Bridgeout", "Dropout", "Weight decay"):
        assert label in text
    assert f"{results['summary']['area']['tiny']['dropout']['mean']:.3f}" in text
    assert f"{100 * results['records']['rounds'][-1]['after']:.1f}" in text
    assert f"{results['records']['sizes/tiny'][0]['parameters']:,}" in text
    assert results["machine"]["cpu"] in text
    # The gain stands before the columns that a narrow screen scrolls to.
    header = re.findall(r"<th(?:\s[^>]*)?>(.*?)</th>", text)
    cuts = [f"{100 * fraction:.0f} %" for fraction in results["settings"]["fractions"]]
    wanted = ["net", "method", "area", "gain", "recalibrated", *cuts]
    assert header[: len(wanted)] == wanted
    assert text.count("<figure>") >= len(results["settings"]["models"])
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(BROWSER is None, reason="there is no browser")
def test_a_browser_shows_the_whole_report(finished, tmp_path, monkeypatch):
    pages = {"toy": (finished / "report.html").read_text()}
    check_alone(Page(pages["toy"]))
    # As wide as it gets: all cuts, and long names.
    text = json.dumps(read(finished)).replace("tiny", "bridgeout_wrn28_10")
    results = json.loads(text)
    results["settings"]["fractions"] = list(FRACTIONS)
    for record in results["records"].values():
        if "recalibrated" in record:
            record["accuracy"] = (4 * record["accuracy"])[:10]
    nothing = Picture([], {}, True)
    monkeypatch.setattr(batch_bridgeout_report, "_picture", lambda results: nothing)
    wide = batch_bridgeout_report.write_report(tmp_path, results)
    pages["wide"] = wide.read_text()
    for name, seen in seen_by_a_browser(tmp_path, pages).items():
        check_seen(seen)
        if "1280" in name:
            assert seen["heads"]["gain"] < seen["heads"]["60 %"] <= 1280
        if name.startswith("wide 1280"):
            assert seen["heads"]["90 %"] <= 1280


def test_the_exported_model_takes_raw_images(finished, data_dir):
    test = load("digits", "test", data_dir=data_dir)
    model = load_exported(finished / "model")
    found = np.mean(np.argmax(model(test.images), -1) == test.labels)
    record = read(finished)["records"]
    assert found == pytest.approx(record["export"]["accuracy"])
    assert found == pytest.approx(record["rounds"][-1]["after"])
    kernel = model.variables["params"]["conv2"]["kernel"]
    assert kernel.shape == (3, 3, 1, 2)  # 80 % of 4 and of 6 filters are gone


def test_a_finished_run_is_not_run_again(finished, data_dir, monkeypatch):
    use_tiny(monkeypatch.setattr)
    monkeypatch.setattr(batch_bridgeout, "work", None)  # calling it would fail
    before = (finished / "results.json").read_bytes()
    words = [*WORDS, "--data-dir", str(data_dir), "--out", str(finished)]
    assert cli.main(["run", "batch_bridgeout", *words]) == 0
    assert (finished / "results.json").read_bytes() == before


def test_other_settings_are_refused(finished, capsys, monkeypatch):
    use_tiny(monkeypatch.setattr)
    words = ["run", "batch_bridgeout", *WORDS, "--out", str(finished)]
    assert cli.main([*words, "--seeds", "3"]) == 2
    told = capsys.readouterr().err
    assert "holds a run of other settings (seeds was 2 and is now 3)" in told
    assert told.count("\n") == 1


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with (
        pytest.raises(cli.UsageError, match="is not empty and holds no run"),
        runs.open_run(tmp_path, {}),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


DAMAGED = ["", "{", "null", "[]", "{}", "[" * 10**5, '{"settings": {}, "records": []}']


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_results_are_told_in_one_line(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with (
        pytest.raises(
            cli.UsageError, match=r"results\.json is damaged .*--out"
        ) as told,
        runs.open_run(tmp_path, {}),
    ):
        pass
    assert "\n" not in str(told.value)
    assert (tmp_path / "results.json").read_text() == text


def test_one_run_at_a_time_is_at_work_in_a_folder(tmp_path):
    with runs.open_run(tmp_path / "run", {}) as run:
        run.put("first", 1)
        with (
            pytest.raises(cli.UsageError, match="another run is at work in"),
            runs.open_run(tmp_path / "run", {}),
        ):
            pass
        run.put("second", 2)
    with runs.open_run(tmp_path / "run", {}) as run:
        assert run.results["records"] == {"first": 1, "second": 2}
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(cli.UsageError, match="file is a file; give another --out"),
        runs.open_run(tmp_path / "file", {}),
    ):
        pass


def test_batches_larger_than_the_data_are_told_in_one_line(tmp_path, data_dir, capsys):
    words = ["--batch-size", str(10**30), "--data-dir", str(data_dir)]
    out = tmp_path / "run"
    assert cli.main(["run", "batch_bridgeout", *words, "--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert "is more than the 1437 training images of digits" in told
    assert told.count("\n") == 1 and not out.exists()


def test_only_an_own_folder_keeps_compiled_programs(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    put = {}
    monkeypatch.setattr(runs.jax.config, "update", put.__setitem__)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    theirs.chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("theirs", "link"):
        runs._keep_compiled(tmp_path / name)
        assert "is not yours alone" in capsys.readouterr().err
    monkeypatch.setattr(runs.os, "getuid", lambda: -1)
    runs._keep_compiled(tmp_path / "of another user")
    assert "is not yours alone" in capsys.readouterr().err and not put
    monkeypatch.undo()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(runs.jax.config, "update", put.__setitem__)
    runs._keep_compiled(tmp_path / "own")
    assert put["jax_compilation_cache_dir"] == str(tmp_path / "own")
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700


def killed(folder, data_dir, records):
    """Starts the job in a process and kills it when it has done some of its work."""
    environment = os.environ | {"JAXPRUNE_DATA": str(data_dir)}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(Path(__file__).parent), str(folder)],
        env=environment,
        stderr=subprocess.PIPE,
    )
    end = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < end:
        if (folder / "results.json").is_file() and len(
            read(folder)["records"]
        ) >= records:
            break
        time.sleep(0.02)
    assert process.poll() is None, process.stderr.read().decode()
    process.kill()
    process.communicate()
    return process.returncode


def interrupted(words, monkeypatch):
    """Presses Ctrl-C as soon as a record is there."""

    def press(name, record):
        signal.raise_signal(signal.SIGINT)
        time.sleep(10)  # the signal comes at the next instruction, at the latest here

    # A suite that was started in the background is handed an ignored SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(batch_bridgeout, "tell", press)
            return cli.main(words)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stopped_run_ends_where_a_whole_one_ends(
    finished, home, data_dir, monkeypatch, capsys
):
    folder = home / "stopped"
    use_tiny(monkeypatch.setattr)
    words = ["run", "batch_bridgeout", *WORDS]
    words += ["--data-dir", str(data_dir), "--out", str(folder)]
    with as_users_do():
        assert interrupted(words, monkeypatch) == 130
    told = capsys.readouterr().err
    assert f"stopped; what is finished is in {folder}" in told
    assert "Traceback" not in told
    done = len(read(folder)["records"])
    assert 0 < done < len(read(finished)["records"])
    assert killed(folder, data_dir, done + 2) == -signal.SIGKILL

    with as_users_do():
        assert cli.main(words) == 0
    found, wanted = read(folder)["records"], read(finished)["records"]
    assert found.keys() == wanted.keys()
    for name in wanted:
        if name.startswith("tiny/"):
            assert found[name]["accuracy"] == wanted[name]["accuracy"], name
    for row, other in zip(found["rounds"], wanted["rounds"], strict=True):
        assert (row["before"], row["after"]) == (other["before"], other["after"])


def test_the_notebook_runs(finished, home, data_dir, monkeypatch, capsys):
    """Every cell but the installation, with the toy net in place of the parameters.

    And with quirks, so that these have been through the whole job too.
    """
    use_tiny(monkeypatch.setattr)
    monkeypatch.setenv("JAXPRUNE_DATA", str(data_dir))
    toy = {"DATASET": "digits", "MODELS": ("tiny",), "SEEDS": 1, "EPOCHS": 2}
    quirky = ("best_test_epoch", "kernels_alone", "scales_too")
    toy |= {"BATCH_SIZE": 256, "ROUNDS": 2, "QUIRKS": quirky}
    toy["OUT"] = str(home / "notebook")
    names = {"__name__": "notebook"}
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    sources = [
        ("".join(cell["source"]), cell["metadata"].get("tags", []))
        for cell in cells
        if cell["cell_type"] == "code"
    ]
    assert sum("install" in tags for _, tags in sources) == 1
    with as_users_do():
        for source, tags in sources:
            if "install" in tags:
                assert "%pip install" in source
                continue
            exec(compile(source, str(NOTEBOOK), "exec"), names)
            if "parameters" in tags:
                assert {name for name in names if name.isupper()} == toy.keys()
                names |= toy
    told = capsys.readouterr().out
    found = read(home / "notebook")
    area = found["summary"]["area"]["tiny"]["bridgeout"]["mean"]
    assert f"area {area:.3f}" in told
    assert "80 % of filters cut" in told and "exported, on 256 test images" in told
    assert "whichever filters went" in (home / "notebook" / "report.html").read_text()
    for method in METHODS:
        record = found["records"][f"tiny/{method}/seed0"]
        assert record["difference"] == []  # nothing to slice where constants are left
        # The same training as without quirks, so its best epoch is no worse.
        plain = read(finished)["records"][f"tiny/{method}/seed0"]["accuracy"]
        assert record["accuracy"][0] >= plain[0]


def test_settings_are_data():
    settings = settings_for("digits", quick=False, **ASK)
    assert dataclasses.is_dataclass(settings)
    assert json.loads(json.dumps(settings.as_json()))["hyper"]


@pytest.mark.parametrize(
    ("module", "start"),
    [(None, "jaxprune"), ("experiments.a_study", "python -m experiments.a_study")],
)
def test_a_run_records_the_command_that_anyone_can_type(
    module, start, tmp_path, monkeypatch
):
    spec = None if module is None else importlib.machinery.ModuleSpec(module, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "it", raising=False)
    for words in (["run", "it"], ["run", "it", "--seeds", "2"]):  # the second goes on
        monkeypatch.setattr(sys, "argv", ["/somewhere/jaxprune", *words])
        with runs.open_run(tmp_path / "run", {}) as run:
            pass
        assert run.results["command"] == " ".join([start, *words])
