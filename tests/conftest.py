"""Strict numerics for every test: no silent rank or dtype promotion."""

import atexit
import gc
import os
import shutil
import tempfile

# Tests meet the same small programs again and again: compile each once a run, for all
# workers and the processes they start. Set the variable to keep the programs between runs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxprune-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

# They compile far more than they run: the same XLA programs, without LLVM's slow passes
# and, where XLA still has the choice, without its MLIR emitters. Read by the first
# computation, not by the import.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jax.__version_info__ < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false"
DEVICES = "--xla_force_host_platform_device_count=8"  # for test_sharded.py
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK} {DEVICES}".strip()

# Tracing makes many small objects that live as long as a cache entry: looking for cycles
# after every 700 of them finds next to nothing.
gc.set_threshold(20_000, 20, 20)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_collection_modifyitems(items):
    """Examples of docstrings say nothing that the tests of their functions do not."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker("once")


@pytest.fixture
def quick_gc():
    """`gc.collect` looks only at what the test itself makes."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def key():
    return jax.random.key(0)
