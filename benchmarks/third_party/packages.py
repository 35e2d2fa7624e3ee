"""The packages, by the names pip knows, and the models of those that are installed."""

import importlib
import importlib.metadata
from collections.abc import Callable

from benchmarks.third_party.models import Model

# Name for pip -> the module here that builds its models.
PACKAGES = {
    "dm-haiku": "haiku_models",
    "transformers": "transformers_models",
    "equinox": "equinox_models",
    "diffrax": "diffrax_models",
    "distrax": "distrax_models",
    "jraph": "jraph_models",
    "keras": "keras_models",
    "google-tunix": "tunix_models",
    "equimo": "equimo_models",
    "jaxonmodels": "jaxonmodels_models",
    "discretax": "discretax_models",
}


def missing(package: str) -> str:
    """Why the models of a package cannot be built here; "" if they can."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    if package == "transformers" and not _has_flax_models():
        return "has no models in Flax, 4.57 was the last with them"
    return ""


def models(package: str) -> dict[str, Callable[[], Model]]:
    """Model name -> how to build it."""
    module = importlib.import_module(f"benchmarks.third_party.{PACKAGES[package]}")
    return module.MODELS


def _has_flax_models() -> bool:
    return int(importlib.metadata.version("transformers").partition(".")[0]) < 5
