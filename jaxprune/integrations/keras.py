"""Keras 3 models on JAX: variables as a tree, `stateless_call` as the function."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from jaxprune.core._types import ApplyFn, PyTree


def keras_apply(model: PyTree, *, training: bool = False) -> tuple[ApplyFn, PyTree]:
    """A Keras model as a pure function and its variables.

    Args:
        model: a built model, with the JAX backend.
        training: how it is called, unless a call says otherwise.

    Returns:
        ``apply_fn(variables, *args, **kwargs)``, which returns the output, and the
        variables ``{"params": {path: array}, "batch_stats": {path: array}}``:
        trainable and non-trainable ones. With ``mutable=["batch_stats"]`` it returns
        the output and the new ones, as `jaxprune.recalibrate` wants.

    Raises:
        ValueError: if the backend is not JAX or the model is not built.
        TypeError: if it is no Keras model.
    """
    keras: Any = importlib.import_module("keras")

    if keras.backend.backend() != "jax":
        raise ValueError(
            f"Keras runs on {keras.backend.backend()!r}; set KERAS_BACKEND=jax before "
            "it is imported"
        )
    if not isinstance(model, keras.Model):
        raise TypeError(f"expected a keras.Model, got a {type(model).__name__}")
    if not model.built:
        raise ValueError("the Keras model is not built; call it once on an example")
    names = {
        "params": _names(model.trainable_variables),
        "batch_stats": _names(model.non_trainable_variables),
    }
    variables = keras_variables(
        model, model.trainable_variables, model.non_trainable_variables
    )
    always = training

    def apply_fn(
        variables: PyTree,
        *args: PyTree,
        training: bool = always,
        mutable: Any = None,
        **kwargs: PyTree,
    ) -> Any:
        given = {
            name: [variables[name][path] for path in paths]
            for name, paths in names.items()
            if name in variables
        }
        out, new = model.stateless_call(
            given["params"],
            given.get("batch_stats", []),
            *args,
            training=training,
            **kwargs,
        )
        if mutable is None:
            return out
        return out, {"batch_stats": dict(zip(names["batch_stats"], new, strict=True))}

    return apply_fn, variables


def keras_call(
    model: PyTree, apply_fn: ApplyFn
) -> Callable[..., tuple[Any, list[Any]]]:
    """`stateless_call` of a pruned model, for a training loop written for Keras.

    The original model's refuses arrays of other shapes.

    Args:
        model: the original model, which knows the order of the variables.
        apply_fn: ``pruned.apply_fn``, what `keras_apply` returned narrowed.

    Returns:
        ``(trainable, non_trainable, *args, training=False, **kwargs) -> (output, new
        non_trainable)`` for the lists of `keras_lists`.
    """
    order = _names(model.non_trainable_variables)

    def stateless_call(
        trainable: Sequence[Any],
        non_trainable: Sequence[Any],
        *args: PyTree,
        training: bool = False,
        **kwargs: PyTree,
    ) -> tuple[Any, list[Any]]:
        variables = keras_variables(model, trainable, non_trainable)
        options: dict[str, Any] = {"training": training, "mutable": ["batch_stats"]}
        out, new = apply_fn(variables, *args, **options, **kwargs)
        return out, [new["batch_stats"][name] for name in order]

    return stateless_call


def keras_variables(
    model: PyTree, trainable: Sequence[Any], non_trainable: Sequence[Any]
) -> PyTree:
    """The tree of variables from the two lists of `stateless_call`.

    Args:
        model: the model, which names them.
        trainable: arrays or Keras variables, in the model's order.
        non_trainable: likewise.
    """
    names = _names(model.trainable_variables), _names(model.non_trainable_variables)
    both = zip(names, (trainable, non_trainable), strict=True)
    params, stats = (
        {n: getattr(v, "value", v) for n, v in zip(own, values, strict=True)}
        for own, values in both
    )
    return {"params": params} | ({"batch_stats": stats} if stats else {})


def keras_lists(model: PyTree, variables: PyTree) -> tuple[list[Any], list[Any]]:
    """The two lists that `keras_call` takes, from the tree of variables.

    Args:
        model: the original model, which knows their order.
        variables: sliced or not.
    """
    stats = variables.get("batch_stats", {})
    return (
        [variables["params"][name] for name in _names(model.trainable_variables)],
        [stats[name] for name in _names(model.non_trainable_variables)],
    )


def _names(variables: Sequence[Any]) -> list[str]:
    """A name for each variable, unique: paths, numbered where two are the same."""
    names: list[str] = []
    for variable in variables:
        name, number = variable.path, 1
        while name in names:
            name, number = f"{variable.path}_{number}", number + 1
        names.append(name)
    return names
