"""`register_rule`: primitives of other libraries."""

from collections.abc import Callable
from typing import Any

from jax.extend.core import Primitive

from jaxprune.coupling._registry import register_label
from jaxprune.coupling.rules._elementwise import elementwise
from jaxprune.coupling.rules._factors import by_factors
from jaxprune.program.primitives import DECLARATIONS, Declaration


def register_rule(
    primitive: Primitive | str,
    declaration: Declaration,
    narrow: Callable[..., object] | None = None,
    *,
    resize: Callable[..., dict[str, Any] | None] | None = None,
) -> None:
    """Teaches the library a primitive, by one declaration.

    Coupling, merging, independent blocks, costs and taps follow from it. For a
    primitive that acts on every position alone it is
    ``jaxprune.program.primitives.elementwise(...)``; for any other it names the factors
    of every axis, as the declarations in `jaxprune.program.primitives` do.

    Args:
        primitive: the primitive or its name.
        declaration: what is known of it.
        narrow: ``(kept, step, *arrays) -> array | list``: how it runs on operands
            without their dead positions, where its parameters name sizes.
        resize: ``(kept, step) -> dict | None``: its parameters that name sizes, at
            those that stay; None hands the step to `narrow`. It costs no tracing.

    Example:
        >>> from jaxprune.coupling._registry import RULES
        >>> from jaxprune.program.primitives import DECLARATIONS, elementwise
        >>> register_rule("my_activation", elementwise("first"))
        >>> DECLARATIONS["my_activation"].zero
        'first'
        >>> del DECLARATIONS["my_activation"], RULES["my_activation"]
    """
    name = primitive if isinstance(primitive, str) else primitive.name
    DECLARATIONS[name] = declaration
    acts_alone = declaration.elementwise
    label = elementwise(declaration.zero) if acts_alone else by_factors
    register_label(label, name, narrow=narrow, resize=resize)
