"""diffrax: neural differential equations, as its examples build them."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from benchmarks.third_party.equinox_modules import module
from benchmarks.third_party.models import Model, normal

KEYS = jax.random.split(jax.random.key(0), 4)
TIMES = jnp.linspace(0.0, 1.0, 5)


class _Field(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t: Any, y: Any, args: Any) -> Any:
        return self.mlp(y)


class _Ode(eqx.Module):
    encode: eqx.nn.Linear
    field: _Field
    decode: eqx.nn.Linear

    def __call__(self, x: jax.Array, adaptive: bool = False) -> jax.Array:
        control = diffrax.PIDController(rtol=1e-3, atol=1e-4)
        out = diffrax.diffeqsolve(
            diffrax.ODETerm(self.field),
            diffrax.Tsit5(),
            0.0,
            1.0,
            0.1,
            self.encode(x),
            stepsize_controller=control if adaptive else diffrax.ConstantStepSize(),
            saveat=diffrax.SaveAt(ts=TIMES),
            max_steps=256,
        )
        return jax.vmap(self.decode)(out.ys)


def neural_ode(adaptive: bool) -> Model:
    net = _Ode(
        eqx.nn.Linear(3, 16, key=KEYS[0]),
        _Field(eqx.nn.MLP(16, 16, 32, 2, jax.nn.softplus, key=KEYS[1])),
        eqx.nn.Linear(16, 2, key=KEYS[2]),
    )
    return module(net, normal(2, 3), call=lambda net, x: net(x, adaptive))


class _ControlledField(eqx.Module):
    mlp: eqx.nn.MLP
    inputs: int

    def __call__(self, t: Any, y: jax.Array, args: Any) -> jax.Array:
        return self.mlp(y).reshape(y.shape[0], self.inputs)


class _Cde(eqx.Module):
    initial: eqx.nn.MLP
    field: _ControlledField
    head: eqx.nn.Linear

    def __call__(self, x: jax.Array) -> jax.Array:
        coefficients = diffrax.backward_hermite_coefficients(TIMES, x)
        control = diffrax.CubicInterpolation(TIMES, coefficients)
        out = diffrax.diffeqsolve(
            diffrax.ControlTerm(self.field, control).to_ode(),
            diffrax.Heun(),
            0.0,
            1.0,
            0.1,
            self.initial(x[0]),
            max_steps=64,
        )
        return self.head(out.ys[-1])


def neural_cde() -> Model:
    net = _Cde(
        eqx.nn.MLP(3, 8, 16, 1, key=KEYS[0]),
        _ControlledField(
            eqx.nn.MLP(8, 24, 16, 1, final_activation=jnp.tanh, key=KEYS[1]), 3
        ),
        eqx.nn.Linear(8, 2, key=KEYS[2]),
    )
    return module(net, normal(2, 5, 3))


class _Diffusion(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t: Any, y: jax.Array, args: Any) -> jax.Array:
        return self.mlp(y).reshape(4, 2)


def neural_sde() -> Model:
    def call(net: Any, y: jax.Array) -> jax.Array:
        noise = diffrax.VirtualBrownianTree(
            0.0, 1.0, 1e-2, shape=(2,), key=jax.random.PRNGKey(3)
        )
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(net[0]), diffrax.ControlTerm(net[1], noise)
        )
        out = diffrax.diffeqsolve(
            terms, diffrax.Euler(), 0.0, 1.0, 0.1, y, max_steps=16
        )
        return out.ys[-1]

    net = (
        _Field(eqx.nn.MLP(4, 4, 16, 1, key=KEYS[0])),
        _Diffusion(eqx.nn.MLP(4, 8, 16, 1, final_activation=jnp.tanh, key=KEYS[1])),
    )
    return module(net, normal(2, 4), call=call)


MODELS: dict[str, Callable[[], Model]] = {
    "neural ODE, fixed steps": lambda: neural_ode(adaptive=False),
    "neural ODE, adaptive steps": lambda: neural_ode(adaptive=True),
    "neural CDE": neural_cde,
    "neural SDE": neural_sde,
}
