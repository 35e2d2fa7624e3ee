"""SP-Net with the settings of its paper, on CIFAR and ImageNet.

    python -m experiments.slimmable.published --dataset imagenet2012 --net resnet50
        --data-dir FOLDER [--seed 0] [--out FILE] [--steps 10]

CIFAR is fetched by `jaxprune.data`; ImageNet is TFDS's ``imagenet2012`` in FOLDER, for
which it wants the archives that only a person can fetch (in FOLDER/downloads/manual).
``--steps`` cuts every training short, to see that everything is there.

The settings are those of the authors' code (https://github.com/hideakikuratsu/SP-Net):
bases trained by themselves with the L1 penalty of scales, widths by keep ratios of
them, joint fine-tuning with in-place distillation. Images of CIFAR are resized to
224x224, as there.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.slimmable import widths
from experiments.slimmable.bench import STATS, Bench, forward
from jaxprune import search
from jaxprune.models import VGG, MobileNetV1, MobileNetV2, imagenet_resnet
from jaxprune.training import bridge_penalty

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE, TEST_SIZE, TEST_BATCH = 224, 256, 100
DATASETS = ("cifar10", "cifar100", "imagenet2012")
_VGG = (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4)

Example = tuple[np.ndarray, int]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training: epochs, the first learning rate, and how it falls.

    Attributes:
        epochs: passes over the data.
        rate: the first learning rate.
        falls: epochs after which it falls by `factor`; () for a cosine.
        factor: what it is multiplied with.
        warm_up: epochs in which it rises from 0.
    """

    epochs: int
    rate: float
    falls: tuple[int, ...] = ()
    factor: float = 0.2
    warm_up: int = 0

    def schedule(self, steps_per_epoch: int) -> optax.Schedule:
        """Step -> learning rate."""
        warm_up = self.warm_up * steps_per_epoch
        if not self.falls:
            return optax.warmup_cosine_decay_schedule(
                0.0 if warm_up else self.rate,
                self.rate,
                warm_up,
                self.epochs * steps_per_epoch,
            )
        falls = {epoch * steps_per_epoch: self.factor for epoch in self.falls}
        return optax.piecewise_constant_schedule(self.rate, falls)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the paper trains one net on one data set with.

    Attributes:
        net: number of classes -> the widest network.
        widest: its width, as a multiple of the usual one.
        bases: widths of the bases, as such multiples, the largest first.
        ratios: the share of its base that a width keeps, the widest first.
        base: training of a base.
        joint: joint training.
        batch: images in a step.
        decay: weight decay.
        decay_all: of biases and BatchNorm too?
        penalty: L1 of scales.
        scale: of BatchNorm before training.
        pretrained: does joint training start from the widest base?
        zero_padded: are writers of streams pruned by themselves?
        temperature: of the teacher.
        smoothing: of labels.
        fine_tune_penalty: is the L1 there in joint training too?
    """

    net: Callable[[int], nn.Module]
    widest: float
    bases: tuple[float, ...]
    ratios: tuple[float, ...]
    base: Stage
    joint: Stage
    batch: int
    decay: float
    decay_all: bool
    penalty: float
    scale: float
    pretrained: bool
    zero_padded: bool
    temperature: float = 1.0
    smoothing: float = 0.0
    fine_tune_penalty: bool = True


def _resnet50(classes: int) -> nn.Module:
    return imagenet_resnet(50, num_classes=classes)


def _vgg(classes: int) -> nn.Module:
    return VGG(classes, _VGG)


_NINETY = Stage(90, 0.1, (30, 50, 70, 80))
_CIFAR = Stage(120, 0.1, (60, 90, 110))
_RESNET = Settings(
    net=_resnet50,
    widest=1.0,
    bases=(1.0, 0.75),
    ratios=(0.526, 0.5484),
    base=_NINETY,
    joint=Stage(60, 0.01, (30, 45), 0.1),
    batch=256,
    decay=1e-4,
    decay_all=True,
    penalty=1e-5,
    scale=0.5,
    pretrained=True,
    zero_padded=True,
)
_CIFAR_RESNET = dataclasses.replace(
    _RESNET, base=_CIFAR, joint=Stage(60, 0.1, (50,)), batch=128
)
_PLAIN = dataclasses.replace(
    _RESNET,
    net=_vgg,
    bases=(0.75, 0.5),
    ratios=(0.7366, 0.557),
    joint=_NINETY,
    pretrained=False,
    zero_padded=False,
)
_CIFAR_PLAIN = dataclasses.replace(
    _PLAIN,
    ratios=(0.8202, 0.6453),
    base=_CIFAR,
    joint=_CIFAR,
    batch=128,
    penalty=1e-4,
)
_MOBILE = dataclasses.replace(
    _PLAIN,
    net=lambda classes: MobileNetV1(classes, width_multiplier=1.5),
    widest=1.5,
    bases=(1.3, 1.0, 0.75),
    ratios=(0.7635, 0.7419, 0.648),
    base=Stage(150, 0.05, warm_up=5),
    joint=Stage(150, 0.08, warm_up=5),
    decay=4e-5,
    decay_all=False,
    temperature=2.0,
)
_MOBILE_V2 = dataclasses.replace(
    _MOBILE,
    net=lambda classes: MobileNetV2(classes, width_multiplier=1.3),
    widest=1.3,
    bases=(1.3, 1.0),
    ratios=(0.6357, 0.6725),
    scale=1.0,
    pretrained=True,
    zero_padded=True,
    temperature=1.0,
    smoothing=0.1,
    fine_tune_penalty=False,
)
SETTINGS: Mapping[tuple[str, str], Settings] = {
    ("imagenet2012", "resnet50"): _RESNET,
    ("imagenet2012", "vgg"): _PLAIN,
    ("imagenet2012", "mobilenet_v1"): _MOBILE,
    ("imagenet2012", "mobilenet_v2"): _MOBILE_V2,
    ("cifar10", "resnet50"): dataclasses.replace(_CIFAR_RESNET, ratios=(0.7835, 0.494)),
    ("cifar100", "resnet50"): dataclasses.replace(
        _CIFAR_RESNET, ratios=(0.7628, 0.6166)
    ),
    ("cifar10", "vgg"): _CIFAR_PLAIN,
    ("cifar100", "vgg"): _CIFAR_PLAIN,
}


class Streamed(Bench):
    """A bench whose images are cropped, resized and flipped on the way.

    Args:
        settings: of the net and data set.
        classes: of the data set.
        train: examples: uint8 ``[height, width, 3]`` and the label.
        test: likewise.
        size: of the images that the net sees.
        most: steps of every training at most; None for all.
    """

    def __init__(
        self,
        settings: Settings,
        classes: int,
        train: Sequence[Example],
        test: Sequence[Example],
        *,
        size: int = SIZE,
        most: int | None = None,
    ) -> None:
        one = np.zeros((1, size, size, 3), np.float32)
        super().__init__(settings.net(classes), (one, None), test)
        self.settings, self.examples, self.size = settings, train, size
        self.most, self.classes = most, classes
        self.epoch = len(train) // settings.batch  # steps in it

    def init(self, seed: int) -> Any:
        """Variables before training, with the paper's scales of BatchNorm."""
        factor = self.settings.scale

        def scaled(path: Any, leaf: Any) -> Any:
            return leaf * factor if path[-1].key == "scale" else leaf

        return jax.tree.map_with_path(scaled, super().init(seed))

    def batches(self, steps: int, seed: int) -> Iterator[Any]:
        """Shuffled batches of crops, epoch after epoch, and smoothed labels."""
        rng, rows = np.random.default_rng(seed), np.zeros(0, int)
        for _ in range(steps):
            if len(rows) < self.settings.batch:
                rows = rng.permutation(len(self.examples))
            now, rows = np.split(rows, [self.settings.batch])
            found = [self.examples[int(row)] for row in now]
            images = np.stack(
                [random_crop(image, self.size, rng) for image, _ in found]
            )
            labels = jnp.asarray([label for _, label in found], jnp.int32)
            smooth = optax.smooth_labels(
                jax.nn.one_hot(labels, self.classes), self.settings.smoothing
            )
            yield images, smooth

    def fit(self, slim: Any, stage: Stage, seed: int, alpha: float, l1: float) -> Any:
        """The variables of all widths after one training of the paper."""
        own, params = self.settings, slim.variables["params"]
        scales = jax.tree.map_with_path(lambda path, _: path[-1].key == "scale", params)
        kernels = jax.tree.map(lambda leaf: own.decay_all or leaf.ndim > 1, params)
        tx = optax.chain(
            optax.add_decayed_weights(own.decay, kernels),
            bridge_penalty(l1, mask=scales) if l1 else optax.identity(),
            optax.sgd(stage.schedule(self.epoch), 0.9, nesterov=True),
        )
        step = search.joint_step(
            slim, tx, forward, alpha=alpha, temperature=own.temperature
        )
        state = search.joint_state(slim, tx, jax.random.key(seed))
        steps = min(stage.epochs * self.epoch, self.most or stage.epochs * self.epoch)
        return self.run(step, state, steps, seed)

    def accuracies(self, slim: Any, variables: Any) -> list[float]:
        """Of every width, on the test images, cropped in their middle."""
        runs = [jax.jit(run) for run in slim]
        right = np.zeros(len(runs))
        count = len(self.test_set) if self.most is None else TEST_BATCH
        for start in range(0, count, TEST_BATCH):
            rows = range(start, min(start + TEST_BATCH, len(self.test_set)))
            found = [self.test_set[row] for row in rows]
            images = np.stack([middle_crop(image, self.size) for image, _ in found])
            labels = np.array([label for _, label in found])
            for i, run in enumerate(runs):
                right[i] += np.sum(
                    np.asarray(run(variables, images).argmax(-1)) == labels
                )
        return [
            round(float(each / min(count, len(self.test_set))), 4) for each in right
        ]


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A crop of 8 to 100 % of the area and of a ratio of 3:4 to 4:3, flipped or not."""
    height, width = image.shape[:2]
    box = (0.0, 0.0, width, height)
    for _ in range(10):
        area = rng.uniform(0.08, 1.0) * height * width
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            box = (left, top, left + w, top + h)
            break
    found = _resized(image, (size, size), box)
    return found[:, ::-1] if rng.random() < 0.5 else found


def middle_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The middle of the image, its shorter side resized to 256 where `size` is 224."""
    height, width = image.shape[:2]
    side = min(height, width) * SIZE / TEST_SIZE
    left, top = (width - side) / 2, (height - side) / 2
    return _resized(image, (size, size), (left, top, left + side, top + side))


def _resized(image: np.ndarray, size: Any, box: Any) -> np.ndarray:
    from PIL import Image

    found = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, box)
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    return (np.asarray(found, np.float32) / 255 - mean) / std


def sp_net(bench: Streamed, seed: int) -> dict[str, Any]:
    """The whole pipeline: bases, widths, joint training; accuracies by width."""
    own, made = bench.settings, []
    for width in own.bases:
        counts = search.uniform(bench.groups, (width / own.widest,))
        slim = bench.slim(bench.init(seed), counts)
        alone = slim.at(0, bench.fit(slim, own.base, seed, 0.0, own.penalty))
        made.append(widths.Base(width, alone.variables, alone.apply_fn, 0.0))
    keeps = found_widths(bench, made)
    start = made[0].variables if own.pretrained else bench.init(seed)
    slim = bench.slim(start, keeps, STATS, zero_padded=own.zero_padded)
    l1 = own.penalty if own.fine_tune_penalty else 0.0
    trained = bench.fit(slim, own.joint, seed, 0.9, l1)
    return {
        "accuracy": bench.accuracies(slim, trained),
        "widths": [dict(each) for each in slim.sizes],
    }


def found_widths(bench: Streamed, made: Sequence[widths.Base]) -> Any:
    """What the paper's ratios keep of the bases, the whole network first."""
    own = bench.settings
    scored = [
        widths.scores_of(bench, base, zero_padded=own.zero_padded) for base in made
    ]
    pairs = list(zip(scored, own.ratios, strict=True))
    if not own.zero_padded:
        found: list[Any] = []
        for base, ratio in pairs:
            found.append(widths.counts_at(bench, base, ratio, found))
        return search.multi_base(bench.groups, found)
    whole = bench.traced(zero_padded=True).groups
    keeps = [{n: np.ones(group.size, bool) for n, group in whole.items()}]
    for base, ratio in pairs:
        keeps.append(widths.units_at(bench, base, ratio, keeps[-1], scored[0][1]))
    return keeps


class _Records(Sequence[Example]):
    """Examples of a TFDS source, decoded when asked for."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: Any) -> Any:
        record = self.source[row]
        return record["image"], int(record["label"])


def examples(dataset: str, data_dir: Path | None) -> Any:
    """The training and test examples of a data set."""
    if dataset != "imagenet2012":
        from jaxprune.data import load

        parts = [load(dataset, split, data_dir=data_dir) for split in ("train", "test")]
        return [list(zip(p.images, p.labels, strict=True)) for p in parts]
    import tensorflow_datasets as tfds

    builder = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    splits = ("train", "validation")
    return [_Records(builder.as_data_source(split)) for split in splits]


def main() -> None:
    """Trains and prints what comes out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", choices=DATASETS, default="cifar10")
    parser.add_argument("--net", default="resnet50")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, help="of every training at most")
    options = parser.parse_args()
    key = options.dataset, options.net
    if key not in SETTINGS:
        known = ", ".join(net for name, net in SETTINGS if name == options.dataset)
        parser.error(f"the paper has no {options.net} on {options.dataset}: {known}")
    train, test = examples(options.dataset, options.data_dir)
    classes = {"cifar10": 10, "cifar100": 100, "imagenet2012": 1000}[options.dataset]
    bench = Streamed(SETTINGS[key], classes, train, test, most=options.steps)
    found = {"dataset": key[0], "net": key[1], **sp_net(bench, options.seed)}
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
