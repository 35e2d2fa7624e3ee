"""equimo: vision, audio, language and time series in Equinox."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from equimo.audio.models.ast import AudioSpectrogramTransformer
from equimo.language.models import TextTransformerEncoder
from equimo.timeseries.models.t0 import T0
from equimo.vision import models

from benchmarks.third_party.equinox_modules import module
from benchmarks.third_party.models import Model, normal, tokens

KEY = jax.random.key(0)
LANGUAGE = {"dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0}


def _image_net(net: Any, side: int = 32, channels: int = 3) -> Model:
    call: Callable[..., Any] = lambda net, x: net(x, key=KEY, inference=True)
    return module(net, normal(2, channels, side, side), call=call)


def vision_transformer(**options: Any) -> Model:
    net = models.VisionTransformer(
        img_size=16,
        in_channels=3,
        dim=32,
        patch_size=4,
        num_heads=4,
        depths=[2],
        num_classes=10,
        key=KEY,
        **options,
    )
    return _image_net(net, 16)


def pyramid(name: str, heads: list[int] | None = None, **options: Any) -> Model:
    """A net of `dims` or of a `dim` that doubles from stage to stage."""
    sizes = {"img_size": 32, "dim": 16, "depths": [1, 1], "num_heads": heads}
    net = getattr(models, name)(
        in_channels=3, num_classes=10, key=KEY, **(sizes if heads else {}), **options
    )
    return _image_net(net)


def audio() -> Model:
    net = AudioSpectrogramTransformer(
        16, 16, 32, 4, 4, 4, 4, [2], num_classes=10, key=KEY
    )
    call: Callable[..., Any] = lambda net, x: net(x, key=KEY, inference=True)
    return module(net, normal(2, 16, 16), call=call)


def language() -> Model:
    net = TextTransformerEncoder(**LANGUAGE, vocab_size=40, key=KEY)
    call: Callable[..., Any] = lambda net, words: net(
        words, jnp.zeros(words.shape), key=KEY, inference=True
    )
    return module(net, tokens(2, 6), call=call)


def time_series() -> Model:
    net = T0(
        embed_dim=32,
        num_layers=3,
        num_heads=4,
        mlp_hidden_dim=48,
        patch_size=4,
        key=KEY,
    )

    def call(net: Any, values: jax.Array) -> jax.Array:
        ones = jnp.ones(values.shape, int)
        return net(values, ones, 0 * ones, 0 * ones, key=KEY, inference=True)

    return module(net, normal(2, 2, 16), call=call)


MODELS: dict[str, Callable[[], Model]] = {
    "ViT": vision_transformer,
    "ViT, SwiGLU, rotary, registers": lambda: vision_transformer(
        ffn_layer="swiglu",
        use_local_pos_embed=True,
        use_global_pos_embed=False,
        qk_norm=True,
        init_values=1e-5,
    ),
    "ConvNeXt": lambda: pyramid("ConvNeXt", depths=[1, 1], dims=[16, 32], use_grn=True),
    "MLLA": lambda: pyramid("Mlla", [2, 4], patch_size=4),
    "VSSD": lambda: pyramid(
        "Vssd", [2, 4], attentions_layers=("mamba2mixer", "attention")
    ),
    "ReduceFormer": lambda: pyramid(
        "ReduceFormer",
        widths=[8, 16, 32],
        depths=[1, 1, 1],
        block_types=["conv", "conv", "attention"],
        head_dim=8,
    ),
    "AttNet": lambda: pyramid(
        "AttNet",
        dims=[16, 32],
        depths=[1, 1],
        exp_rates=[2, 2],
        kernel_sizes=[3, 3],
        glu_dwconv=[True, False],
        glu_norm=[True, False],
    ),
    "audio spectrogram transformer": audio,
    "text encoder": language,
    "T0": time_series,
}
