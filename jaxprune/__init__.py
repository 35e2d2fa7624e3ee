"""jaxprune: prune any JAX function.

Five questions, in this order: which axes belong together (`trace`), how much does each
matter (`scores`, `group_scores`), which ones stay (`select`), what if they were gone
(`expand_masks`, `apply_masks`, `hold_masks`, `bridgeout`), make them gone
(`slice_params`, `narrow`). `prune` asks all five in one call.

Families live in namespaces: `scores`, `select`, `search`, `clusters`, `taps`,
`training`, `schedules`, `noisy_layers`, `plans`; and, imported on first use because
they need further packages, `io`, `checkpoints`, `export`, `integrations`, `display`,
`data` and `models`.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from jaxprune import scores, search, select, training
from jaxprune.core import (
    Group,
    Groups,
    Member,
    Pinned,
    apply_masks,
    expand_masks,
    sparsity,
    without_branches,
)
from jaxprune.costing import (
    CostModel,
    Costs,
    LatencyTable,
    cost_model,
    costs,
    latency_table,
)
from jaxprune.coupling import register_rule, trace
from jaxprune.narrowing import narrow
from jaxprune.recipes import (
    Pruned,
    Rounds,
    Sensitivity,
    load,
    plans,
    prune,
    rounds,
    sensitivity,
)
from jaxprune.scores import group_scores
from jaxprune.search import slimmable
from jaxprune.select import clusters
from jaxprune.statistics import recalibrate, taps
from jaxprune.surgery import (
    Factorised,
    Merged,
    MergeError,
    compensate,
    deviation,
    factor_ranks,
    factorise,
    merge,
    merge_error,
    permute,
    slice_opt_state,
    slice_params,
    unslice_params,
)
from jaxprune.training import (
    bridgeout,
    hold_masks,
    noisy_params,
    schedules,
)
from jaxprune.training.noise import layers as noisy_layers

if TYPE_CHECKING:
    from jaxprune import data, display, integrations, io, models
    from jaxprune.io import checkpoints, export

__version__: str

# Need flax, orbax or more, so they are imported on first use.
_LAZY = {
    "checkpoints": "jaxprune.io.checkpoints",
    "data": "jaxprune.data",
    "display": "jaxprune.display",
    "export": "jaxprune.io.export",
    "integrations": "jaxprune.integrations",
    "io": "jaxprune.io",
    "models": "jaxprune.models",
}

__all__ = [
    "CostModel",
    "Costs",
    "Factorised",
    "Group",
    "Groups",
    "LatencyTable",
    "Member",
    "MergeError",
    "Merged",
    "Pinned",
    "Pruned",
    "Rounds",
    "Sensitivity",
    "__version__",
    "apply_masks",
    "bridgeout",
    "checkpoints",
    "clusters",
    "compensate",
    "cost_model",
    "costs",
    "data",
    "deviation",
    "display",
    "expand_masks",
    "export",
    "factor_ranks",
    "factorise",
    "group_scores",
    "hold_masks",
    "integrations",
    "io",
    "latency_table",
    "load",
    "merge",
    "merge_error",
    "models",
    "narrow",
    "noisy_layers",
    "noisy_params",
    "permute",
    "plans",
    "prune",
    "recalibrate",
    "register_rule",
    "rounds",
    "schedules",
    "scores",
    "search",
    "select",
    "sensitivity",
    "slice_opt_state",
    "slice_params",
    "slimmable",
    "sparsity",
    "taps",
    "trace",
    "training",
    "unslice_params",
    "without_branches",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("jaxprune")
    if name in _LAZY:
        return importlib.import_module(_LAZY[name])
    raise AttributeError(f"module 'jaxprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
