"""transformers 4.57, the last with models in Flax: language, vision, speech."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import transformers

from benchmarks.third_party.models import Model, normal, tokens

IMAGE = (16, 16, 3)  # the models want the channels first, their set-up last
ENCODER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
SEQ2SEQ = {
    "vocab_size": 40,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}


def _model(name: str, config: str, options: dict[str, Any], *args: Any, **static: Any):
    """The logits of the model of this class name, evaluated without dropout."""
    settings = getattr(transformers, config)(**options)
    image = {"input_shape": (1, *IMAGE)} if args[0].ndim == 4 else {}
    net = getattr(transformers, name)(settings, seed=0, **image)

    def apply_fn(variables: Any, *args: Any) -> Any:
        return net(*args, params=variables, **static).logits

    return Model(apply_fn, net.params, args)


def encoder(name: str, config: str, **options: Any) -> Model:
    return _model(name, config, {**ENCODER, **options}, tokens(2, 6))


def gpt2() -> Model:
    options = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return _model(
        "FlaxGPT2LMHeadModel", "GPT2Config", options | {"n_positions": 16}, tokens(2, 6)
    )


def gpt_neo() -> Model:
    options = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "num_heads": 4,
        "max_position_embeddings": 16,
        "window_size": 4,
    }
    return _model("FlaxGPTNeoForCausalLM", "GPTNeoConfig", options, tokens(2, 6))


def gptj() -> Model:
    options = {
        "vocab_size": 40,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 4,
        "n_positions": 16,
    }
    return _model("FlaxGPTJForCausalLM", "GPTJConfig", options, tokens(2, 6))


def bloom() -> Model:
    options = {"vocab_size": 40, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    return _model("FlaxBloomForCausalLM", "BloomConfig", options, tokens(2, 6))


def opt() -> Model:
    options = ENCODER | {"ffn_dim": 48, "word_embed_proj_dim": 32}
    return _model("FlaxOPTForCausalLM", "OPTConfig", options, tokens(2, 6))


def decoder(name: str, config: str, **options: Any) -> Model:
    grouped = {"num_key_value_heads": 2, "head_dim": 8}
    return _model(name, config, ENCODER | grouped | options, tokens(2, 6))


def seq2seq(name: str, config: str, **options: Any) -> Model:
    return _model(
        name,
        config,
        SEQ2SEQ | {"max_position_embeddings": 16} | options,
        tokens(2, 6),
        decoder_input_ids=tokens(2, 4),
    )


def vision(name: str, config: str, **options: Any) -> Model:
    sizes = {k: v for k, v in ENCODER.items() if k != "vocab_size"}
    image = {"image_size": 16, "patch_size": 4}
    return _model(name, config, sizes | image | options, normal(2, 3, 16, 16))


def convolutional(name: str, config: str, **options: Any) -> Model:
    sizes = {
        "embedding_size": 16,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
    }
    return _model(name, config, sizes | options, normal(2, 3, 16, 16))


def clip() -> Model:
    sizes = {k: v for k, v in ENCODER.items() if k != "vocab_size"}
    text = ENCODER | {"bos_token_id": 0, "eos_token_id": 39, "projection_dim": 24}
    options = {
        "text_config": text,
        "vision_config": sizes | {"image_size": 16, "patch_size": 4},
        "projection_dim": 24,
    }
    config = transformers.CLIPConfig(**options)
    net = transformers.FlaxCLIPModel(
        config, input_shape=((1, 1), (1, 16, 16, 3)), seed=0
    )

    def apply_fn(variables: Any, words: Any, images: Any) -> Any:
        out = net(words, images, params=variables)
        return out.logits_per_text, out.text_embeds, out.image_embeds

    return Model(apply_fn, net.params, (tokens(2, 6), normal(2, 3, 16, 16)))


def wav2vec2() -> Model:
    options = {k: v for k, v in ENCODER.items() if k != "max_position_embeddings"}
    convolutions = {
        "conv_dim": (16, 16),
        "conv_stride": (4, 2),
        "conv_kernel": (8, 3),
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
        "do_stable_layer_norm": True,
        "feat_extract_norm": "layer",
    }
    return _model(
        "FlaxWav2Vec2ForCTC", "Wav2Vec2Config", options | convolutions, normal(2, 400)
    )


def whisper() -> Model:
    options = SEQ2SEQ | {
        "num_mel_bins": 8,
        "max_source_positions": 12,
        "max_target_positions": 12,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    config = transformers.WhisperConfig(**options)
    net = transformers.FlaxWhisperForConditionalGeneration(
        config, input_shape=(1, 8, 24), seed=0
    )

    def apply_fn(variables: Any, sound: Any, words: Any) -> Any:
        return net(sound, words, params=variables).logits

    return Model(apply_fn, net.params, (normal(2, 8, 24), jnp.asarray(tokens(2, 4))))


MODELS: dict[str, Callable[[], Model]] = {
    "BERT": lambda: encoder("FlaxBertForSequenceClassification", "BertConfig"),
    "ALBERT": lambda: encoder(
        "FlaxAlbertForMaskedLM", "AlbertConfig", embedding_size=16
    ),
    "RoFormer": lambda: encoder("FlaxRoFormerForMaskedLM", "RoFormerConfig"),
    "DistilBERT": lambda: encoder(
        "FlaxDistilBertForMaskedLM",
        "DistilBertConfig",
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=48,
    ),
    "GPT-2": gpt2,
    "GPT-Neo": gpt_neo,
    "GPT-J": gptj,
    "BLOOM": bloom,
    "OPT": opt,
    "Llama": lambda: decoder("FlaxLlamaForCausalLM", "LlamaConfig"),
    "Gemma": lambda: decoder("FlaxGemmaForCausalLM", "GemmaConfig"),
    "BART": lambda: seq2seq("FlaxBartForConditionalGeneration", "BartConfig"),
    "ViT": lambda: vision("FlaxViTForImageClassification", "ViTConfig"),
    "BEiT": lambda: vision(
        "FlaxBeitForImageClassification",
        "BeitConfig",
        use_relative_position_bias=True,
        layer_scale_init_value=0.1,
    ),
    "DINOv2": lambda: vision("FlaxDinov2ForImageClassification", "Dinov2Config"),
    "ResNet": lambda: convolutional("FlaxResNetForImageClassification", "ResNetConfig"),
    "RegNet": lambda: convolutional(
        "FlaxRegNetForImageClassification", "RegNetConfig", groups_width=8
    ),
    "CLIP": clip,
    "Wav2Vec2": wav2vec2,
    "Whisper": whisper,
}
