"""The public commands as a recipe runs them: each in a process of its own, answering with the document it prints."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import recipes
from dslify.errors import TrainError

CHECKPOINTS = ("SOUNDSTREAM_CHECKPOINT",)  # variables that name a file, from where the recipe was started


def dslify(threads: int, command: str, *options: str) -> dict[str, Any]:
    """One public command -> the document that it prints. threads: of torch. Raises TrainError with what it said."""
    words = [sys.executable, "-m", "dslify", command, *options, "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment |= {name: str(Path(path).resolve()) for name in CHECKPOINTS if (path := os.environ.get(name))}
    root = Path(recipes.__file__).parents[1]  # where `recipes` is found even if it is not installed
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        raise TrainError(f"dslify {shlex.join((command, *options))} failed: {said}")
    return json.loads(done.stdout)
