"""jaxonmodels: the models in Equinox that can be imported without PyTorch."""

from collections.abc import Callable

import jax
from jaxonmodels.models import mamba, vit

from benchmarks.third_party.equinox_modules import module
from benchmarks.third_party.models import Model, normal, tokens

KEY = jax.random.key(0)


def vision_transformer() -> Model:
    net = vit.VisionTransformer(16, 4, 32, 2, 4, 24, key=KEY)
    return module(net, normal(2, 3, 16, 16), call=lambda net, x: net(x)[0])


def state_space() -> Model:
    net = mamba.Mamba(n_embd=16, n_dims=40, n_layers=2, d_state=8, key=KEY)
    return module(net, tokens(2, 6))


MODELS: dict[str, Callable[[], Model]] = {
    "CLIP's ViT": vision_transformer,
    "Mamba": state_space,
}
