"""Declarations of primitives against the primitives themselves.

An entry of a result may depend on an entry of an operand only where all factors that
both are indexed by agree; that, and what is linear or 0, is tried on numbers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Literal

from jaxprune.program import contracted_axes
from jaxprune.program._contracted import contracted_axes_of
from jaxprune.program._interpret import HOLDERS
from jaxprune.program._jaxprs import bind, opened
from jaxprune.program.primitives import DECLARATIONS, declaration

RNG = np.random.default_rng(0)


def some(*shape, dtype=np.float32):
    if np.issubdtype(dtype, np.integer):
        return RNG.integers(1, 5, size=shape, dtype=dtype)
    return RNG.uniform(0.2, 0.8, size=shape).astype(dtype)


def numbers(*values):
    return np.array(values, np.int32)


F, G, C, N = (
    some(2, 3),
    some(2, 3),
    some(2, 3, dtype=np.complex64),
    some(2, 3, dtype=np.int32),
)
CONV = functools.partial(
    lax.conv_general_dilated, window_strides=(1,), padding=((0, 0),),
    dimension_numbers=("NCH", "OIH", "NCH"),
)  # fmt: skip
RAGGED = lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])
ONE_FLOAT = """
    neg sign floor ceil round abs sqrt cbrt tanh sin tan asin atan sinh asinh atanh erf
    erf_inv expm1 log1p square exp exp2 logistic cos cosh acos erfc is_finite log rsqrt
    acosh lgamma digamma bessel_i0e bessel_i1e stop_gradient
""".split()
TWO_FLOATS = """
    add sub mul div rem max min eq ne lt le gt ge nextafter igamma igammac polygamma
    zeta atan2 complex pow
""".split()
TWO_INTEGERS = "shift_left shift_right_logical shift_right_arithmetic".split()

CASES = {
    **{name: (getattr(lax, name), F) for name in ONE_FLOAT},
    "acosh": (lax.acosh, F + 1),
    **{name: (getattr(lax, name), F, G) for name in TWO_FLOATS},
    **{name: (getattr(lax, name), N, N % 3) for name in TWO_INTEGERS},
    **{f"{name} number": (getattr(lax, name), F, np.float32(0.3)) for name in ("mul", "add")},
    "and": (lax.bitwise_and, N, N.T.reshape(2, 3)),
    "or": (lax.bitwise_or, N, N.T.reshape(2, 3)),
    "xor": (lax.bitwise_xor, N, N.T.reshape(2, 3)),
    "not": (lax.bitwise_not, N),
    "clz": (lax.clz, N),
    "population_count": (lax.population_count, N),
    "real": (lax.real, C),
    "imag": (lax.imag, C),
    "conj": (lax.conj, C),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 8, 20), F),
    "regularized_incomplete_beta": (lax.betainc, F, G, some(2, 3)),
    "integer_pow": (lambda x: lax.integer_pow(x, 3), F),
    "select_n": (lax.select_n, F > 0.5, F, G),
    "select_n scalar": (lax.select_n, np.bool_(True), F, G),
    "clamp": (lax.clamp, np.float32(0.3), F, np.float32(0.6)),
    "convert_element_type": (lambda x: lax.convert_element_type(x, np.complex64), F),
    "bitcast_convert_type": (lambda x: lax.bitcast_convert_type(x, np.int32), F),
    "copy": (jnp.copy, F),
    "optimization_barrier": (lambda *x: lax.optimization_barrier(x), F, some(4)),
    "device_put": (lambda *x: jax.device_put(x), F, some(4)),
    "dot_general": (
        lambda x, y: lax.dot_general(x, y, (((2,), (1,)), ((0,), (2,)))),
        some(2, 3, 4),
        some(5, 4, 2),
    ),
    "reshape of a transpose": (lambda x: lax.reshape(x, (4, 6), (1, 0)), some(8, 3)),
    "ragged_dot_general": (lax.ragged_dot, some(4, 3), some(2, 3, 2), numbers(1, 3)),
    "ragged_dot_general contracted": (
        lambda x, y, n: lax.ragged_dot_general(x, y, n, RAGGED),
        some(4, 3),
        some(4, 2),
        numbers(1, 3),
    ),
    "conv_general_dilated": (CONV, some(2, 2, 4), some(3, 2, 2)),
    "conv_general_dilated grouped": (
        functools.partial(CONV, feature_group_count=2),
        some(2, 4, 3),
        some(6, 2, 2),
    ),
    "conv_general_dilated by batches": (
        functools.partial(CONV, batch_group_count=2),
        some(4, 2, 3),
        some(6, 2, 2),
    ),
    "conv_general_dilated transposed": (
        functools.partial(CONV, lhs_dilation=(2,)),
        some(1, 2, 3),
        some(3, 2, 2),
    ),
    **{
        f"reduce_{kind}": (functools.partial(getattr(lax, f"reduce_{kind}"), axes=(1,)), F)
        for kind in ("sum", "max", "min", "prod")
    },
    **{
        f"reduce_{kind}": (functools.partial(getattr(lax, f"reduce_{kind}"), axes=(0,)), N)
        for kind in ("and", "or", "xor")
    },
    **{
        name: (functools.partial(getattr(lax, name), axis=1, index_dtype=np.int32), F)
        for name in ("argmax", "argmin")
    },
    **{
        name: (functools.partial(getattr(lax, name), axis=1), F)
        for name in "cumsum cumprod cummax cummin cumlogsumexp".split()
    },
    **{
        f"reduce_window_{name}": (
            functools.partial(
                lax.reduce_window, init_value=init, computation=fn,
                window_dimensions=(1, 2), window_strides=(1, 1), padding="VALID",
            ),
            F,
        )
        for name, fn, init in (
            ("max", lax.max, np.float32(-np.inf)),
            ("min", lax.min, np.float32(np.inf)),
            ("sum", lax.add, np.float32(0)),
        )
    },
    "sort": (lambda x, y: lax.sort((x, y), dimension=1, num_keys=1), F, G),
    "top_k": (lambda x: lax.top_k(x, 2), F),
    "fft": (jnp.fft.fft, C),
    "broadcast_in_dim": (lambda x: lax.broadcast_in_dim(x, (4, 3, 2), (2, 0)), some(1, 4)),
    "reshape": (lambda x: lax.reshape(x, (2, 4, 3)), some(8, 3)),
    "reshape without common factors": (lambda x: lax.reshape(x, (3, 2)), F),
    "squeeze": (lambda x: lax.squeeze(x, (1,)), some(2, 1, 3)),
    "transpose": (lambda x: lax.transpose(x, (2, 0, 1)), some(2, 3, 2)),
    "slice": (lambda x: lax.slice(x, (0, 1), (2, 6), (1, 2)), some(2, 6)),
    "rev": (lambda x: lax.rev(x, (1,)), F),
    "pad": (lambda x, c: lax.pad(x, c, ((1, 0, 0), (-1, 2, 1))), F, np.float32(0)),
    "split": (lambda x: lax.split(x, (1, 2), 1), F),
    "concatenate": (lambda x, y: lax.concatenate([x, y], 1), F, some(2, 2)),
    "dynamic_slice": (lambda x: lax.dynamic_slice(x, (0, 2), (2, 2)), some(2, 5)),
    "dynamic_slice by data": (
        lambda x, k: lax.dynamic_slice(x, (0, k), (2, 2)),
        some(2, 5),
        np.int32(1),
    ),
    "dynamic_update_slice": (
        lambda x, y: lax.dynamic_update_slice(x, y, (0, 2)),
        some(2, 5),
        some(2, 2),
    ),
    "gather": (lambda x: x[:, numbers(2, 0)], F),
    "gather by data": (lambda x, k: x[k], F, numbers(1, 0, 1)),
    "gather with a batch": (
        lambda x, k: jnp.take_along_axis(x, k, axis=1),
        F,
        numbers([0, 2], [1, 1]),
    ),
    **{
        name: (lambda x, y, op=op: getattr(x.at[:, numbers(2, 0)], op)(y), F, some(2, 2))
        for name, op in (
            ("scatter", "set"), ("scatter-add", "add"), ("scatter-sub", "subtract"),
            ("scatter-mul", "multiply"), ("scatter-min", "min"), ("scatter-max", "max"),
        )
    },
    "scatter by data": (lambda x, k, y: x.at[k].set(y), F, np.int32(1), some(3)),
}  # fmt: skip
M = np.einsum("nij,nkj->nik", some(2, 2, 2), some(2, 2, 2)) + 2 * np.eye(
    2, dtype=np.float32
)
CASES |= {
    "cholesky": (lax.linalg.cholesky, M),
    "qr": (lax.linalg.qr, M),
    "eigh": (lax.linalg.eigh, M),
    "eig": (lax.linalg.eig, M),
    "svd": (lax.linalg.svd, M),
    "lu": (lax.linalg.lu, M),
    "triangular_solve": (
        lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True),
        M,
        some(2, 2, 3),
    ),
    "tridiagonal_solve": (
        lax.linalg.tridiagonal_solve,
        some(2, 3),
        some(2, 3) + 2,
        some(2, 3),
        some(2, 3, 1),
    ),
    "householder_product": (lax.linalg.householder_product, M, some(2, 2)),
    "lu_pivots_to_permutation": (
        lambda p: lax.linalg.lu_pivots_to_permutation(p, 3),
        numbers([0, 1], [1, 1]),
    ),
}  # fmt: skip
# Not made by a function of lax in every JAX, or of no numbers.
UNTRIED = set(
    """
    add_any eq_to le_to lt_to name sharding_constraint pvary pcast copy_p tile stack
    unstack permute iota random_bits random_gamma rng_uniform random_seed random_split
    zeros_like layout_constraint reshard relayout with_memory_space_constraint
    reduced_vary_cast reduced_vary_cast_p vary_unreduced_cast vary_unreduced_cast_p
    log2 mulhi one_minus_square igamma_grad_a polynomial
    schur hessenberg geqrf geqp3 ormqr symmetric_product
    random_fold_in random_wrap random_unwrap random_clone threefry2x32 rng_bit_generator
    """.split()
)


def found(jaxpr, arrays, name):
    """The first equation of this primitive, its operands, and which of them vary."""
    jaxpr, consts = opened(jaxpr)
    env = dict(zip([*jaxpr.invars, *jaxpr.constvars], [*arrays, *consts], strict=True))
    vary = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        literal = [isinstance(v, Literal) for v in eqn.invars]
        operands = [
            np.asarray(v.val if known else env[v])
            for v, known in zip(eqn.invars, literal, strict=True)
        ]
        free = [
            not known and v in vary
            for v, known in zip(eqn.invars, literal, strict=True)
        ]
        if eqn.primitive.name == name:
            return eqn, operands, free
        if eqn.primitive.name in ("jit", "pjit"):
            inside = found(eqn.params["jaxpr"], operands, name)
            if inside is not None:
                return inside
        env.update(zip(eqn.outvars, bind(eqn, *operands), strict=True))
        vary.update(eqn.outvars if any(free) else ())
    return None


@functools.cache
def case(name):
    fn, *operands = CASES[name]
    result = found(jax.make_jaxpr(fn)(*operands), operands, name.split()[0])
    assert result is not None, f"{name} makes no such equation"
    eqn, operands, free = result
    constants = [None if vary else x for vary, x in zip(free, operands, strict=True)]
    known = declaration(eqn)
    return eqn, operands, known, known.signature(eqn, constants.__getitem__)


def run(eqn, operands):
    return [np.asarray(x) for x in bind(eqn, *operands)]


def places(axes, moved, number, sizes, index):
    """Factor -> the position of it that an entry stands at."""
    at = {f: line[0] for (k, f), line in moved.items() if k == number}
    for factors, position in zip(axes, index, strict=True):
        lengths = [len(moved.get((number, f), range(sizes[f]))) for f in factors]
        split = np.unravel_index(position, lengths) if factors else ()
        for f, place in zip(factors, split, strict=True):
            at[f] = moved[number, f][place] if (number, f) in moved else place
    return at


def may_depend(signature, k, i, j, o):
    """May entry `o` of result `j` depend on entry `i` of operand `k`?"""
    read = places(signature.ins[k], signature.at, k, signature.sizes, i)
    made = places(signature.outs[j], signature.taken, j, signature.sizes, o)
    shared = read.keys() & made.keys() - signature.mixed
    return k in signature.feeding(j) and all(read[f] == made[f] for f in shared)


def changed(x):
    """Another number, near enough to order and index the same kind of thing."""
    return x ^ 1 if x.dtype.kind in "iu" else ~x if x.dtype == bool else x + 0.05


@pytest.mark.parametrize("name", CASES)
def test_results_depend_on_what_the_factors_say(name):
    eqn, operands, _, signature = case(name)
    before = run(eqn, operands)
    dependent = 0
    for k, x in enumerate(operands):
        if k in signature.deciding and x.ndim == 0:
            continue
        for i in np.ndindex(x.shape):
            moved = [np.array(y) for y in operands]
            moved[k][i] = changed(moved[k])[i]
            for j, (a, b) in enumerate(zip(before, run(eqn, moved), strict=True)):
                for o in np.argwhere(~np.isclose(a, b, 1e-5, 1e-7, equal_nan=True)):
                    assert may_depend(signature, k, i, j, tuple(o)), (k, i, j, o)
                    dependent += 1
    smooth = name in ONE_FLOAT and before[0].dtype == np.float32
    assert dependent or not smooth or name in "sign floor ceil round".split()


@pytest.mark.parametrize("name", CASES)
def test_sizes_of_factors_are_those_of_axes(name):
    eqn, _, _, signature = case(name)
    sides = (
        (eqn.invars, signature.ins, signature.at),
        (eqn.outvars, signature.outs, signature.taken),
    )
    for variables, all_axes, moved in sides:
        for k, (var, axes) in enumerate(zip(variables, all_axes, strict=True)):
            for n, factors in zip(var.aval.shape, axes, strict=True):
                sizes = [
                    len(moved.get((k, f), range(signature.sizes[f]))) for f in factors
                ]
                assert not factors or np.prod(sizes) == n


@pytest.mark.parametrize("name", CASES)
def test_what_is_said_to_be_linear_is(name):
    eqn, operands, known, signature = case(name)
    kind = known.combines(eqn)
    if kind not in ("add", "multiply", "divide"):
        return
    data = [k for k in range(len(operands)) if k not in signature.deciding]
    groups = [data] if kind == "add" else [[k] for k in data]
    for scaled in groups[: 1 if kind == "divide" else None]:
        more = [
            x * x.dtype.type(2) if k in scaled else x for k, x in enumerate(operands)
        ]
        for a, b in zip(run(eqn, operands), run(eqn, more), strict=True):
            np.testing.assert_allclose(2 * a, b, rtol=1e-4)


@pytest.mark.parametrize(
    "name", [n for n in CASES if DECLARATIONS[n.split()[0]].elementwise]
)
def test_results_are_0_where_it_says_so(name):
    eqn, operands, known, _ = case(name)
    if eqn.primitive.name in ("select_n", "clamp", "pow", "integer_pow", "max", "min"):
        return  # it depends on the case or on a limit
    zeros = {
        "first": [[0]], "any": [[k] for k in range(len(operands))], "quotient": [[0]],
        "all": [range(len(operands))], "never": [],
    }[known.zero]  # fmt: skip
    for each in zeros:
        cut = [np.zeros_like(x) if k in each else x for k, x in enumerate(operands)]
        assert not np.any(run(eqn, cut)[0])
    if known.zero == "never":
        cut = [np.zeros_like(x) for x in operands]
        some_value = run(eqn, cut)[0].ravel()
        assert some_value.any() or eqn.primitive.name in MAY_BE_0


# Comparisons may be false; -0.0 has a bit.
MAY_BE_0 = "bessel_i1e bitcast_convert_type ne lt gt nextafter igamma igammac atan2 polygamma zeta".split()


def test_every_primitive_is_tried():
    tried = {name.split()[0] for name in CASES}
    assert tried | UNTRIED == set(DECLARATIONS)
    assert not tried & UNTRIED
    assert not HOLDERS & set(DECLARATIONS)


def test_axes_that_a_parameter_is_summed_over():
    def net(p, x):
        h = jax.nn.relu(x @ p["plain"]) @ p["turned"].T
        h = jnp.einsum("bd,dhk->bhk", h, p["heads"] * 2.0)
        h = jnp.einsum("bhk,hkd->bd", h, p["out"])
        step = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
        h, _ = jax.lax.scan(step, h, p["layers"])
        return h + p["bias"][None]

    shapes = {
        "plain": (4, 6), "turned": (5, 6), "heads": (5, 2, 3), "out": (2, 3, 4),
        "layers": (3, 4, 4), "bias": (4,),
    }  # fmt: skip
    params = {name: some(*shape) for name, shape in shapes.items()}
    assert contracted_axes(net, params, some(2, 4)) == {
        "plain": (0,), "turned": (1,), "heads": (0,), "out": (0, 1), "layers": (1,),
        "bias": (),
    }  # fmt: skip


def test_a_kernel_sums_over_its_channels_before_its_window():
    conv = functools.partial(CONV, feature_group_count=2)
    jaxpr = jax.make_jaxpr(conv)(some(2, 4, 3), some(6, 2, 2))
    assert contracted_axes_of(jaxpr, [False, True]) == [(), (1, 2)]
