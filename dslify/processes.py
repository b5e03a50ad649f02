"""Which of several processes this one is, as torchrun tells it; nothing here knows torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Place:
    """rank: of all `world` processes, 0 is the one that writes and prints. local_rank, local_world: on this machine."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    local_world: int = 1

    @property
    def nodes(self) -> int:
        return self.world // self.local_world


def place() -> Place:
    """Where torchrun put this process; the only one where torchrun did not start it."""
    found = [os.environ.get(name, "") for name in NAMES]
    return Place(*map(int, found)) if all(text.isdigit() for text in found) else Place()
