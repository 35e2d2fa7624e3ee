"""google-tunix: decoders in Flax NNX, as they are tuned."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.third_party.models import Model, tokens

SIZES = {
    "num_layers": 2,
    "embed_dim": 32,
    "hidden_dim": 48,
    "num_heads": 4,
    "head_dim": 8,
    "num_kv_heads": 2,
}
ROTARY = {"vocab_size": 40, "rope_theta": 10_000, "norm_eps": 1e-6}


def _decoder(net: nnx.Module, *args: Any) -> Model:
    graph, state = nnx.split(net)

    def apply_fn(variables: Any, words: jax.Array) -> Any:
        length = words.shape[1]
        filled = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(filled, variables)
        positions = jnp.broadcast_to(jnp.arange(length), words.shape)
        mask = jnp.tril(jnp.ones((1, length, length), bool))
        mask = jnp.broadcast_to(mask, (words.shape[0], length, length))
        return nnx.merge(graph, filled)(words, positions, None, mask)[0]

    return Model(apply_fn, nnx.to_pure_dict(state), (tokens(2, 6),))


def rotary(module: str, name: str, **options: Any) -> Model:
    family = importlib.import_module(f"tunix.models.{module}.model")
    config = family.ModelConfig(**(SIZES | ROTARY | options))
    return _decoder(getattr(family, name)(config, rngs=nnx.Rngs(0)))


def gemma() -> Model:
    from tunix.models.gemma import model as family

    config = family.ModelConfig(
        **SIZES,
        num_embed=40,
        final_logit_softcap=30.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=[
            family.AttentionType.LOCAL_SLIDING,
            family.AttentionType.GLOBAL,
        ],
        attn_logits_soft_cap=50.0,
        sliding_window_size=4,
    )
    return _decoder(family.Gemma(config, rngs=nnx.Rngs(0)))


def gemma3() -> Model:
    from tunix.models.gemma3 import model as family

    config = family.ModelConfig(
        **SIZES, num_embed=40, sliding_window_size=4, param_dtype=jnp.float32
    )
    return _decoder(family.Gemma3(config, rngs=nnx.Rngs(0)))


MODELS: dict[str, Callable[[], Model]] = {
    "Llama 3": lambda: rotary("llama3", "Llama3"),
    "Llama 3, tied": lambda: rotary("llama3", "Llama3", weight_tying=True),
    "Qwen 2": lambda: rotary("qwen2", "Qwen2"),
    "Qwen 3": lambda: rotary("qwen3", "Qwen3"),
    "Qwen 3, experts": lambda: rotary(
        "qwen3", "Qwen3", num_experts=4, num_experts_per_tok=2
    ),
    "Gemma 2": gemma,
    "Gemma 3": gemma3,
}
