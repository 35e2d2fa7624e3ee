"""Strict numerics for every test: no silent rank or dtype promotion."""

import os

import jax
import pytest

# Tests compile far more than they run: the same XLA programs, without LLVM's slow passes
# (a third of all processor time). Read by the first computation, not by the import.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def key():
    return jax.random.key(0)
