"""The process that runs `torch_pruning_side.py`: one request, one answer."""

import json
import pathlib
import shutil
import subprocess
from typing import Any

MODULE = "benchmarks.torch_pruning_side"
ROOT = pathlib.Path(__file__).parent.parent


class TorchPruning:
    """Torch-Pruning under its own interpreter; `versions` is None if it is absent."""

    def __init__(self, python: str | None) -> None:
        self.versions: dict[str, str] | None = None
        if python is None:
            self.missing = "no --torch-python given"
            return
        self.missing = f"{python} cannot import torch and torch_pruning"
        command = pathlib.Path(shutil.which(python) or python).absolute()
        try:
            self._process = subprocess.Popen(
                [str(command), "-m", MODULE],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError as error:
            self.missing = f"{python}: {error.strerror}"
            return
        first = self._read()
        if first is None:
            self._process.communicate()
            return
        self.versions = first["versions"]

    def measure(self, net: str, sizes: list[int]) -> dict[str, Any] | None:
        """Times of one round of pruning, or None if torch is absent."""
        if self.versions is None:
            return None
        assert self._process.stdin is not None
        print(json.dumps({"net": net, "sizes": sizes}), file=self._process.stdin)
        self._process.stdin.flush()
        answer = self._read()
        if answer is None:
            raise RuntimeError(f"torch_pruning_side.py stopped at {net} {sizes}")
        return answer

    def close(self) -> None:
        """Ends the process."""
        if self.versions is not None:
            self._process.communicate()

    def _read(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None
