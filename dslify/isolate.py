"""A check in a process of its own, because a crash inside PyTorch would take the user's process with it."""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .errors import DslifyError, VerifyError, one_line

SECONDS = 60.0
REFUSED = b"autograd refuses to run in a fork"


def in_child(check: Callable[[], None]) -> None:
    """Run a check that returns nothing in a forked process.

    Raises the check's own DslifyError, or VerifyError when the child died or took more than SECONDS. Where a
    process cannot fork (Windows), another device is in use, or this process has run a backward pass before (autograd
    then refuses to run in a fork), the check runs here.
    """
    if not hasattr(os, "fork") or (torch.cuda.is_available() and torch.cuda.is_initialized()):
        check()
        return
    with tempfile.TemporaryFile() as answer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on fork beside threads
            child = os.fork()
        if child == 0:
            _answer(check, answer)
        deadline = time.monotonic() + SECONDS
        while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise VerifyError(
                    f"The light path did not run forward and backward within {SECONDS:.0f} s; choose a later cut."
                )
            time.sleep(0.002)
        answer.seek(0)
        words = answer.read()
    if os.WIFSIGNALED(done[1]):
        name = signal.Signals(os.WTERMSIG(done[1])).name
        raise VerifyError(
            f"PyTorch itself crashes ({name}) when the light path runs forward and backward; choose another cut."
        )
    if words == REFUSED:
        check()
    elif words:
        raise VerifyError(words.decode())


def _answer(check: Callable[[], None], answer: Any) -> None:
    """The child's part: run, write the message of a failure, leave without the parent's exit handlers."""
    try:
        faulthandler.disable()  # a crash is reported by the parent
        torch.set_num_threads(1)  # the parent's thread pool did not come along
        check()
    except DslifyError as error:
        answer.write(str(error).encode())
    except BaseException as error:
        refused = "fork-based multiprocessing" in str(error)
        answer.write(REFUSED if refused else f"The light path does not run: {one_line(error)}.".encode())
    finally:
        answer.flush()
        os._exit(0)
