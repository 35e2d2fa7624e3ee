"""The data model: groups, masks, packed masks and limits. Knows no JAX program."""

from jaxprune.core._branches import without_branches as without_branches
from jaxprune.core._groups import Group as Group
from jaxprune.core._groups import Groups as Groups
from jaxprune.core._groups import Member as Member
from jaxprune.core._groups import Pinned as Pinned
from jaxprune.core._groups import Reason as Reason
from jaxprune.core._leaves import named_leaves as named_leaves
from jaxprune.core._leaves import parameter_paths as parameter_paths
from jaxprune.core._limits import Each as Each
from jaxprune.core._limits import Limits as Limits
from jaxprune.core._masks import apply_masks as apply_masks
from jaxprune.core._masks import expand_masks as expand_masks
from jaxprune.core._masks import sparsity as sparsity
from jaxprune.core._packing import PackedMasks as PackedMasks
from jaxprune.core._packing import pack_masks as pack_masks
from jaxprune.core._packing import unpack_masks as unpack_masks
from jaxprune.core._positions import axis_keep as axis_keep
from jaxprune.core._positions import outer_mask as outer_mask
from jaxprune.core._types import PyTree as PyTree
