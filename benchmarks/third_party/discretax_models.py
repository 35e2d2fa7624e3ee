"""discretax: state space models in Equinox."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from discretax import models
from discretax.encoder import LinearEncoder
from discretax.heads import ClassificationHead

from benchmarks.third_party.equinox_modules import stateful
from benchmarks.third_party.models import Model, normal

KEYS = jax.random.split(jax.random.key(0), 3)


def classifier(layer: Callable[..., Any], **options: Any) -> Model:
    def build() -> Any:
        parts = [
            LinearEncoder(in_features=4, out_features=16, key=KEYS[0]),
            layer(hidden_dim=16, num_blocks=2, key=KEYS[1], **options),
            ClassificationHead(in_features=16, out_features=3, key=KEYS[2]),
        ]
        return eqx.nn.Sequential(parts)

    call: Callable[..., Any] = lambda net, state, x: net(
        x, state, key=jax.random.key(0)
    )
    return stateful(eqx.nn.make_with_state(build)(), call, normal(2, 8, 4))


MODELS: dict[str, Callable[[], Model]] = {
    "S5": lambda: classifier(models.S5, state_dim=8),
    "LRU": lambda: classifier(models.LRU, state_dim=8),
    "LinOSS": lambda: classifier(models.LinOSS, state_dim=8),
    "DeltaNet": lambda: classifier(models.DeltaNet, n_heads=4, chunk_size=4),
}
