"""One job in a process of its own, with limits on time and memory, so that a crash is one line of a result."""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAST_LINES = 3  # of a crashed child's standard error
_CONTEXT = multiprocessing.get_context("forkserver")  # a server without threads imports the networks' libraries, once
_CONTEXT.set_forkserver_preload(["benchmarks.zoo.registry", "benchmarks.zoo.check", "benchmarks.warm"])


def in_child(target: Callable[..., None], *args: Any, seconds: float, gigabytes: float) -> str:
    """Call target(*args) in a child. Returns why it ended early, "" if it came to its end."""
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "stderr"
        child = _CONTEXT.Process(target=_work, args=(target, args, errors, gigabytes))
        child.start()
        child.join(seconds)
        if child.is_alive():
            child.kill()
            child.join()
            return f"not finished after {seconds:.0f} s"
        if child.exitcode:
            last = " | ".join(errors.read_text().strip().splitlines()[-LAST_LINES:])
            return f"the process ended with {child.exitcode}: {last}"
    return ""


def _work(target: Callable[..., None], args: tuple[Any, ...], errors: Path, gigabytes: float) -> None:
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 2**30),) * 2)
    warnings.simplefilter("ignore")
    target(*args)
