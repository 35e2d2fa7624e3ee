"""TFLite and ONNX, through converters that are imported when they are asked for."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.extend.core
import numpy as np
from jax.interpreters import partial_eval

from jaxprune.core._extras import needing
from jaxprune.core._types import PyTree
from jaxprune.io._files import first_line, write_atomically
from jaxprune.io._programs import (
    batch_size,
    check_agreement,
    each_example,
    random_batch,
    with_batch,
)

Runner = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


def save_tflite(
    path: str | Path,
    apply_fn: Callable[..., PyTree],
    variables: PyTree,
    *args: PyTree,
    tolerance: float | None = None,
) -> None:
    """Writes a model as a TFLite file, with the variables in it, for any batch size.

    Before it is written, the file is run by LiteRT on random inputs of two batch
    sizes and compared with `apply_fn`.

    Args:
        path: the file; replaced as a whole.
        apply_fn: ``(variables, *args) -> outputs`` with the batch as leading axis,
            every example by itself (see `jaxprune.io.save_exported`).
        variables: tree of arrays.
        *args: example arguments.
        tolerance: largest difference allowed, see `jaxprune.io.save_exported`.

    Raises:
        ValueError: if the converter does not know an operation, or the file computes
            something else; nothing is written then.
        ModuleNotFoundError: if the extra ``jaxprune[tflite]`` is missing.

    References:
        `LiteRT <https://ai.google.dev/edge/litert>`_
    """
    with needing("TFLite files", "tflite"):
        tf = import_module("tensorflow")
        litert = import_module("ai_edge_litert.interpreter")
        jax2tf = import_module("jax.experimental.jax2tf")
    flat, leaves = _flat(apply_fn, variables, args)
    with _converting("TFLite"):
        shapes = ["batch, ..."] * len(leaves)
        converted = jax2tf.convert(flat, polymorphic_shapes=shapes)
        signature = [
            tf.TensorSpec([None, *leaf.shape[1:]], leaf.dtype, name=f"input_{i}")
            for i, leaf in enumerate(leaves)
        ]
        function = tf.function(converted, autograph=False, input_signature=signature)
        concrete = function.get_concrete_function()
        converter = tf.lite.TFLiteConverter.from_concrete_functions(
            [concrete], function
        )
        content = converter.convert()

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        machine = litert.Interpreter(model_content=content)
        details = machine.get_input_details()
        for about, value in zip(details, inputs, strict=True):
            machine.resize_tensor_input(about["index"], value.shape)
        machine.allocate_tensors()
        for about, value in zip(details, inputs, strict=True):
            machine.set_tensor(about["index"], value)
        machine.invoke()
        return [machine.get_tensor(d["index"]) for d in machine.get_output_details()]

    _verify("the TFLite file", run, apply_fn, variables, args, tolerance)
    write_atomically(path, content)


def save_onnx(
    path: str | Path,
    apply_fn: Callable[..., PyTree],
    variables: PyTree,
    *args: PyTree,
    tolerance: float | None = None,
) -> None:
    """Writes a model as an ONNX file, with the variables in it, for any batch size.

    Before it is written, the file is run by ONNX Runtime on random inputs of two
    batch sizes and compared with `apply_fn`.

    Args:
        path: the file; replaced as a whole.
        apply_fn: ``(variables, *args) -> outputs`` with the batch as leading axis,
            every example by itself (see `jaxprune.io.save_exported`).
        variables: tree of arrays.
        *args: example arguments.
        tolerance: largest difference allowed, see `jaxprune.io.save_exported`.

    Raises:
        ValueError: if the converter does not know an operation, or the file computes
            something else; nothing is written then.
        ModuleNotFoundError: if the extra ``jaxprune[onnx]`` is missing.

    References:
        `jax2onnx <https://github.com/enpasos/jax2onnx>`_
    """
    flat, leaves = _flat(apply_fn, variables, args)
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = list(with_batch(leaves, batch))
    # Traced before the converter is imported: it patches Flax, which `narrow` reads.
    closed = _without_dead_code(jax.make_jaxpr(flat)(*shapes))
    with needing("ONNX files", "onnx"):
        jax2onnx = import_module("jax2onnx")
        onnxruntime = import_module("onnxruntime")
    with _converting("ONNX"):
        program = jax.extend.core.jaxpr_as_fun(closed)
        model = jax2onnx.to_onnx(lambda *xs: tuple(program(*xs)), inputs=shapes)
        content = model.SerializeToString()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        )

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        names = [about.name for about in session.get_inputs()]
        return session.run(None, dict(zip(names, inputs, strict=True)))

    _verify("the ONNX file", run, apply_fn, variables, args, tolerance)
    write_atomically(path, content)


def _flat(
    apply_fn: Callable[..., PyTree], variables: PyTree, args: Sequence[PyTree]
) -> tuple[Callable[..., list[Any]], list[Any]]:
    """The function of the leaves of the arguments, with its variables in it."""
    batch_size(args)
    leaves, treedef = jax.tree.flatten(tuple(args))
    mapped = each_example(apply_fn)

    def flat(*inputs: PyTree) -> list[Any]:
        return jax.tree.leaves(mapped(variables, *treedef.unflatten(inputs)))

    return flat, leaves


def _without_dead_code(closed: Any) -> Any:
    jaxpr, used = partial_eval.dce_jaxpr(
        closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True
    )
    del used  # instantiated: every input stays
    return jax.extend.core.ClosedJaxpr(jaxpr, closed.consts)


def _verify(
    what: str,
    run: Runner,
    apply_fn: Callable[..., PyTree],
    variables: PyTree,
    args: Sequence[PyTree],
    tolerance: float | None,
) -> None:
    own, size = jax.jit(apply_fn), max(batch_size(args), 1)
    for batch in (size, size + 1):
        inputs = random_batch(args, batch, seed=batch)
        with _converting(what):
            found = run([np.asarray(leaf) for leaf in jax.tree.leaves(inputs)])
        check_agreement(what, own(variables, *inputs), found, tolerance)


@contextlib.contextmanager
def _converting(what: str) -> Iterator[None]:
    """Converters raise anything; one line of it is kept, and nothing is written."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{what}: the converter failed, so nothing was written: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
