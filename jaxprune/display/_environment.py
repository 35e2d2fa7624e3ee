"""What numbers were measured on, and by which command."""

import importlib.metadata
import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("jaxprune", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


def machine() -> dict[str, Any]:
    """Says what the numbers were measured on.

    Returns:
        CPU model, cores this process may use, operating system, versions.

    Example:
        >>> sorted(machine())
        ['cores', 'cpu', 'system', 'versions']
    """
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), **versions},
    }


def as_facts(found: dict[str, Any]) -> dict[str, str]:
    """What `machine` found, as lines to read."""
    versions = ", ".join(
        f"{name} {number}" for name, number in found["versions"].items()
    )
    return {
        "machine": f"{found['cpu']}, {found['cores']} cores, {found['system']}",
        "versions": versions,
    }


def command() -> str:
    """What was typed to start this process, as anyone can type it.

    Returns:
        The command without paths of this machine; "" in a notebook and at a prompt.
    """
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is None and not hasattr(main, "__file__"):
        return ""
    script = Path(sys.argv[0]).name
    own = ["python", script] if script.endswith(".py") else [script]
    if spec is not None:
        own = ["python", "-m", spec.name.removesuffix(".__main__")]
    return shlex.join([*own, *sys.argv[1:]])


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()
