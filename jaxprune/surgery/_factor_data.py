"""Factors that are best on data, before or behind a ReLU, from second moments."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune.core._names import listed, matching, nearest, patterns
from jaxprune.statistics._contractions import Bias, Contraction
from jaxprune.statistics._moments import Moments
from jaxprune.surgery._factor_program import Split

# The authors raise the weight of the constraint from 0.01 to 1; each for so many turns.
PENALTIES = (0.01, 0.1, 1.0)
TURNS, DRAWS = 12, 4


class Inputs(NamedTuple):
    """Moments of the inputs of a kernel, in the order of its form.

    Attributes:
        mean: ``[K, D]``.
        covariance: ``[K, D, D]``.
        bias: int ``[K, N]``, positions in the leaf `bias_path`; None if the bias is not
            to change.
        bias_path: path of the bias, or "".
    """

    mean: np.ndarray
    covariance: np.ndarray
    bias: np.ndarray | None = None
    bias_path: str = ""

    @property
    def second(self) -> np.ndarray:
        """``E[x x^T]``."""
        return self.covariance + self.mean[:, :, None] * self.mean[:, None, :]


def ordered(split: Split, moments: Moments, contraction: Contraction | None) -> Inputs:
    """The moments of a kernel's inputs, matched by positions in the leaf.

    Args:
        split: of the kernel.
        moments: of its contraction.
        contraction: the same, for its bias; None to leave that alone.
    """
    size = int(np.prod(split.shape))
    here = split.matrices(np.arange(size).reshape(split.shape))
    there = moments.at
    if here.shape != there.shape:
        raise ValueError(
            f"the moments of {split.path} are of {there.shape[0]} matrices of "
            f"{there.shape[1:]}, but it has {here.shape[0]} of {here.shape[1:]}"
        )
    bias = None if contraction is None else contraction.bias
    places = {int(at.min()): k for k, at in enumerate(there)}
    blocks = [places[int(at.min())] for at in here]
    met = [there[k] for k in blocks]
    rows = [_order(a.min(1), b.min(1)) for a, b in zip(met, here, strict=True)]
    columns = [_order(a.min(0), b.min(0)) for a, b in zip(met, here, strict=True)]
    pairs = list(zip(blocks, rows, strict=True))
    return Inputs(
        np.stack([moments.mean[k][r] for k, r in pairs]),
        np.stack([moments.covariance[k][np.ix_(r, r)] for k, r in pairs]),
        _bias_at(bias, blocks, columns),
        bias.path if bias is not None and bias.sign == 1 else "",
    )


def _bias_at(
    bias: Bias | None, blocks: Sequence[int], columns: Sequence[np.ndarray]
) -> np.ndarray | None:
    if bias is None or bias.sign != 1:
        return None
    return np.stack([bias.at[k][c] for k, c in zip(blocks, columns, strict=True)])


def _order(have: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Where each of the wanted numbers is among those there are."""
    order = np.argsort(have)
    found = order[np.searchsorted(have[order], want)]
    assert (have[found] == want).all()
    return found


def best_on_inputs(
    matrices: np.ndarray, second: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    r"""Factors with the least :math:`E\|W^T x - \tilde W^T x\|^2` of their rank.

    With V the leading eigenvectors of :math:`W^T E[x x^T] W`, the second moments of the
    responses, that is :math:`\tilde W = W V V^T`.
    """
    _, vectors = np.linalg.eigh(matrices.mT @ second @ matrices)  # ascending
    leading = vectors[..., ::-1][..., :rank]
    return matrices @ leading, leading.mT


def best_behind_relu(
    matrix: np.ndarray,
    mean: np.ndarray,
    covariance: np.ndarray,
    bias: np.ndarray | None,
    rank: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Both factors of one kernel ``[D, N]``, and its new bias, for a ReLU behind it.

    Responses are drawn from the Gaussian of the first two moments.
    """  # fmt: skip
    offset = np.zeros(matrix.shape[1]) if bias is None else bias
    center, spread = mean @ matrix + offset, matrix.T @ covariance @ matrix
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(max(2048, DRAWS * len(center)), len(center)))
    responses = center + draws @ _root(spread)
    left, right, shift = relu_regression(responses, rank, bias is not None)
    # y = M (W^T x + b) + c with M = left right: the kernel is W right^T left^T.
    new = None if bias is None else left @ (right @ bias) + shift
    return matrix @ right.T, left.T, new


def _root(spread: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(spread)
    return np.sqrt(np.maximum(values, 0))[:, None] * vectors.T


def relu_regression(
    responses: np.ndarray, rank: int, with_bias: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""A map M of low rank and a shift c, for the least error behind a ReLU.

    .. math:: \min_{M, c} \sum_i \| r(y_i) - r(M y_i + c) \|^2, \qquad r(y) = \max(y, 0)

    by turns, with a copy z of :math:`M y + c` that is held to it ever more strictly: z
    in closed form, M and c by regression of reduced rank.

    Args:
        responses: y, ``[rows, N]``.
        rank: of M.
        with_bias: may c be other than 0?

    Returns:
        ``[N, rank]`` and ``[rank, N]``, the factors of M, and c ``[N]``.

    Example:
        >>> y = np.array([[1.0, -5.0], [2.0, -6.0], [3.0, -7.0], [4.0, -9.0]])
        >>> left, right, shift = relu_regression(y, 1)
        >>> made = np.maximum(y @ (left @ right).T + shift, 0)
        >>> bool(np.abs(made - np.maximum(y, 0)).max() < 0.05)
        True

    References:
        Zhang et al., `Accelerating Very Deep Convolutional Networks
        <https://arxiv.org/abs/1505.06798>`_, 2015
    """
    found = start = reduced_rank(responses, responses, rank, with_bias)
    for penalty in PENALTIES:
        for _ in range(TURNS):
            targets = relaxed(responses, predicted(responses, found), penalty)
            found = reduced_rank(responses, targets, rank, with_bias)
    return min((start, found), key=lambda each: behind_relu(responses, each))


def predicted(responses: np.ndarray, found: tuple[np.ndarray, ...]) -> np.ndarray:
    """``M y + c`` of every row."""
    left, right, shift = found
    return responses @ right.T @ left.T + shift


def behind_relu(responses: np.ndarray, found: tuple[np.ndarray, ...]) -> float:
    """The sum of squares that is minimised."""
    made = np.maximum(predicted(responses, found), 0)
    return float(np.square(np.maximum(responses, 0) - made).sum())


def relaxed(responses: np.ndarray, made: np.ndarray, penalty: float) -> np.ndarray:
    r"""The z with the least :math:`(r(y) - r(z))^2 + penalty (z - made)^2`."""
    wanted = np.maximum(responses, 0)
    below = np.minimum(made, 0)
    above = np.maximum((penalty * made + wanted) / (penalty + 1), 0)

    def cost(z: np.ndarray) -> np.ndarray:
        gap = np.square(wanted - np.maximum(z, 0))
        return gap + penalty * np.square(z - made)

    return np.where(cost(below) <= cost(above), below, above)


def reduced_rank(
    inputs: np.ndarray, targets: np.ndarray, rank: int, with_bias: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Regression of targets on inputs by a matrix of this rank: factors and shift."""
    zero = np.zeros(inputs.shape[1])
    x0, z0 = (inputs.mean(0), targets.mean(0)) if with_bias else (zero, zero)
    x, z = inputs - x0, targets - z0
    gram = x.T @ x
    gram += 1e-9 * np.trace(gram) / len(gram) * np.eye(len(gram))
    whole = np.linalg.solve(gram, x.T @ z).T  # z = whole x
    _, vectors = np.linalg.eigh(whole @ (x.T @ z))
    leading = vectors[:, ::-1][:, :rank]
    right = leading.T @ whole
    return leading, right, z0 - leading @ (right @ x0)


def inputs_of(
    splits: Mapping[str, Split],
    moments: Sequence[Moments],
    relu: str | Sequence[str],
    found: Mapping[str, Contraction],
) -> tuple[dict[str, Inputs], set[str]]:
    """Path -> moments of its inputs, and the kernels that a ReLU follows.

    Raises:
        ValueError: if a kernel is not of a kind that moments are for, if moments of a
            kernel are missing, or if a pattern matches none of the kernels.
    """
    by_name = {one.name: one for one in moments}
    behind: set[str] = set()
    for pattern in patterns("relu", relu):
        met = matching(pattern, splits)
        if not met:
            raise ValueError(
                f"relu names {pattern!r}, which matches no kernel that is factorised"
                f"{nearest(pattern, splits)}"
            )
        behind.update(met)
    missing = [path for path in splits if path not in by_name]
    if missing:
        raise ValueError(
            f"there are no moments of the inputs of {listed(missing, 3)}; take them of "
            "all kernels that are factorised"
        )
    known: dict[str, Inputs] = {}
    for path, split in splits.items():
        if split.kind != "channel":
            raise ValueError(f'moments are for kind="channel", not {split.kind!r}')
        own = found.get(path) if path in behind else None
        known[path] = ordered(split, by_name[path], own)
    return known, behind


def on_data(
    split: Split, leaf: np.ndarray, inputs: Inputs, behind: bool, bias: Any, rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Factors ``[K, D, rank]``, ``[K, rank, N]`` and biases ``[K, N]``, if they change.

    Args:
        split: of the kernel.
        leaf: its value.
        inputs: moments.
        behind: does a ReLU follow?
        bias: value of the leaf `inputs.bias_path`.
        rank: of the factors.
    """
    whole = split.matrices(leaf)
    if not behind:
        return *best_on_inputs(whole, inputs.second, rank), None
    offsets = None if inputs.bias is None else np.ravel(bias)[inputs.bias]
    parts = [
        best_behind_relu(
            w, inputs.mean[k], inputs.covariance[k],
            None if offsets is None else offsets[k], rank,
        )
        for k, w in enumerate(whole)
    ]  # fmt: skip
    left, right, new = zip(*parts, strict=True)
    return np.stack(left), np.stack(right), None if offsets is None else np.stack(new)
