"""Edits of parameters: slice, merge, compensate; masks of several cuts in a row."""

from jaxprune.surgery._compensation import compensate as compensate
from jaxprune.surgery._composing import compose_masks as compose_masks
from jaxprune.surgery._composing import units_kept as units_kept
from jaxprune.surgery._consumers import scale_units as scale_units
from jaxprune.surgery._factor_ranks import factor_ranks as factor_ranks
from jaxprune.surgery._factorise import Factorised as Factorised
from jaxprune.surgery._factorise import factorise as factorise
from jaxprune.surgery._merging import Merged as Merged
from jaxprune.surgery._merging import MergeError as MergeError
from jaxprune.surgery._merging import averaging_matrix as averaging_matrix
from jaxprune.surgery._merging import deviation as deviation
from jaxprune.surgery._merging import merge as merge
from jaxprune.surgery._merging import merge_error as merge_error
from jaxprune.surgery._permuting import permute as permute
from jaxprune.surgery._slicing import slice_opt_state as slice_opt_state
from jaxprune.surgery._slicing import slice_params as slice_params
from jaxprune.surgery._slicing import unslice_params as unslice_params
