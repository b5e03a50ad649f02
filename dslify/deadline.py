"""A time limit on a block of code that nothing inside can swallow, and that a busy machine does not shorten."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WAITED = Path("/proc/thread-self/schedstat")  # Linux: nanoseconds on a processor, and waiting for one
_SHORTEST = 0.01  # seconds
_AGAIN = 2.0  # seconds until a limit that was lost (in a destructor, say) is raised again


class OutOfTime(BaseException):
    """No Exception, because torch.export and many a network swallow those."""


def own_time() -> float:
    """Seconds on a clock that stands still while this thread waits for a processor that others have."""
    try:
        waited = int(_WAITED.read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):  # another system
        waited = 0.0
    return time.monotonic() - waited


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after `seconds` of own_time; no limit outside the main thread, where signals do not
    arrive."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    end = own_time() + max(seconds, _SHORTEST)

    def stop(*_: Any) -> None:
        if (left := end - own_time()) > _SHORTEST:
            signal.setitimer(signal.ITIMER_REAL, left, _AGAIN)
        else:
            raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, _SHORTEST), _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
