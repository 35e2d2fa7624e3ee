"""The nets that the benchmarks measure, as functions and shapes.

A `Net` makes a fresh function at each call of `make`, because JAX caches traces by
function. Variables and inputs are shapes; `real_variables` fills them with noise.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import decoders
from benchmarks.nnx_nets import NNX_NETS
from jaxprune.models import MODELS, ResNet, ViT


@dataclasses.dataclass(frozen=True)
class Net:
    """A function of (variables, *args), known by its shapes."""

    make: Callable[[], Callable[..., Any]]
    variables: Any
    args: tuple[Any, ...]

    @property
    def parameters(self) -> int:
        """How many numbers the variables hold."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.variables))


def real_variables(net: Net, seed: int = 0) -> Any:
    """Arrays of the net's shapes: small normal noise, 1 + noise for vectors."""
    rng = np.random.default_rng(seed)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = 0.02 * rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(noise + 1 if leaf.ndim == 1 else noise, leaf.dtype)

    return jax.tree.map(fill, net.variables)


class DenseNet(nn.Module):
    """DenseNet-BC: every layer reads all features of its stage and appends its own.

    The default is DenseNet-121: 7,978,856 parameters.

    References:
        Huang et al., `Densely Connected Convolutional Networks
        <https://arxiv.org/abs/1608.06993>`_, 2016, Table 1.
    """

    stage_sizes: Sequence[int] = (6, 12, 24, 16)
    growth: int = 32
    stem_width: int = 64
    stem: str = "imagenet"
    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.stem == "imagenet":
            x = _conv(self.stem_width, 7, stride=2)(x)
            x = _norm_relu(x)
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore
        else:
            x = _conv(self.stem_width, 3)(x)
        for stage, size in enumerate(self.stage_sizes):
            if stage:
                x = _conv(x.shape[-1] // 2, 1)(_norm_relu(x))
                x = nn.avg_pool(x, (2, 2), (2, 2))
            for _ in range(size):
                y = _conv(4 * self.growth, 1)(_norm_relu(x))
                y = _conv(self.growth, 3)(_norm_relu(y))
                x = jnp.concatenate([x, y], axis=-1)
        return nn.Dense(self.num_classes)(_norm_relu(x).mean(axis=(1, 2)))


def _conv(width: int, kernel: int, stride: int = 1) -> nn.Conv:
    sides = (kernel, kernel)
    return nn.Conv(width, sides, (stride, stride), padding="SAME", use_bias=False)


def _norm_relu(x: jax.Array) -> jax.Array:
    return nn.relu(nn.BatchNorm(use_running_average=True)(x))


def image_net(module: nn.Module, side: int) -> Net:
    """A Linen module on one image of `side` x `side` x 3."""
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    return Net(lambda: lambda v, x: module.apply(v, x), variables, (images,))


def nnx_net(build: Callable[[nnx.Rngs], nnx.Module], side: int) -> Net:
    """An NNX module on one image of `side` x `side` x 3."""
    module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def make() -> Callable[..., Any]:
        def apply(variables: Any, x: jax.Array) -> jax.Array:
            own = variables["params"], variables["batch_stats"]
            return nnx.merge(graph, *own)(x)

        return apply

    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = {
        "params": nnx.to_pure_dict(params),
        "batch_stats": nnx.to_pure_dict(rest),
    }
    return Net(make, variables, (images,))


def decoder_net(config: decoders.Llama, length: int) -> Net:
    """A decoder in plain JAX on one sequence."""
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return Net(
        lambda: lambda params, tokens: decoders.llama(config, params, tokens),
        decoders.llama_shapes(config),
        (tokens,),
    )


_TOKENS = jax.ShapeDtypeStruct((1, 128), jnp.int32)


def _gpt2() -> Net:
    module = decoders.LinenGpt()
    variables = jax.eval_shape(module.init, jax.random.key(0), _TOKENS)
    return Net(lambda: lambda v, x: module.apply(v, x), variables, (_TOKENS,))


def _gpt2_jax() -> Net:
    config = decoders.Gpt()
    return Net(
        lambda: lambda params, tokens: decoders.gpt(config, params, tokens),
        decoders.gpt_shapes(config),
        (_TOKENS,),
    )


NETS: Mapping[str, Callable[[], Net]] = MappingProxyType(
    {
        "mobilenet_v2": lambda: image_net(MODELS["mobilenet_v2"](), 224),
        "resnet50": lambda: image_net(MODELS["resnet50"](), 224),
        "vit_b16": lambda: image_net(MODELS["vit_b16"](), 224),
        "gpt2_small": _gpt2,
        "vgg16_bn": lambda: image_net(MODELS["vgg16_bn_imagenet"](), 224),
        "densenet121": lambda: image_net(DenseNet(), 224),
        **{
            f"{name}_nnx": partial(nnx_net, build, 224)
            for name, build in NNX_NETS.items()
        },
        "gpt2_small_jax": _gpt2_jax,
    }
)
"""The nets at their published sizes."""


def densenet_sweep(layers: int) -> Net:
    """DenseNet of three stages of `layers` layers, 4 new channels a layer."""
    return image_net(DenseNet((layers,) * 3, 4, 8, "cifar", 10), 32)


def vit_sweep(blocks: int) -> Net:
    """ViT of `blocks` blocks, 32 wide, 4 heads."""
    return image_net(
        ViT(10, patch_size=8, width=32, depth=blocks, num_heads=4, head_dim=8), 32
    )


def resnet_sweep(blocks: int) -> Net:
    """Bottleneck ResNet of `blocks` blocks in two stages, 16 and 32 wide."""
    sizes = (blocks // 2, blocks - blocks // 2)
    return image_net(ResNet(sizes, widths=(16, 32), bottleneck=True), 32)


SWEEPS: Mapping[str, tuple[Callable[[int], Net], tuple[int, ...]]] = MappingProxyType(
    {
        "densenet": (densenet_sweep, (6, 12, 24, 48)),
        "vit": (vit_sweep, (12, 24, 48, 96)),
        "resnet": (resnet_sweep, (16, 50, 150)),
    }
)
"""Depth sweeps: how to build a net of a depth, and the depths."""
