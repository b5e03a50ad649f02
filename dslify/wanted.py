"""How samples are to be read: what open_data's arguments come to, for the rooms that read files and items."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from .images import Pixels
from .samples import shaped, show_progress

DEFAULT_RATE = 16_000  # Hz, said in the report when nothing else was given
_Any = TypeVar("_Any")


@dataclass(frozen=True)
class Wanted:
    """How the network takes its samples, and how to read them; see open_data. shape: of one sample, None if unknown."""

    shape: tuple[int, ...] | None
    rate: int | None
    pixels: Pixels | None
    classes: tuple[str, ...]
    workers: int | None
    seed: int
    progress: bool | None

    @property
    def hertz(self) -> int:
        """The network's sampling rate."""
        return self.rate or DEFAULT_RATE

    def tracked(self, items: Iterable[_Any], total: int | None, text: str) -> Iterator[_Any]:
        """`items`, with a bar on stderr."""
        with show_progress(self.progress) as bar:
            yield from bar.track(items, total=total, description=text)

    def instead(self) -> str:
        """What is known of the network's input, for the sentence that says why it cannot be read."""
        return "no input shape is known" if self.shape is None else f"the network reads {shaped(self.shape)} per sample"
