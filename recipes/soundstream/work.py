"""Where the evaluation keeps what it makes, and what all of its stages agree on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

import dslify
from recipes.soundstream.model import SoundStream, pretrained
from recipes.stages import WorkFolder

SEGMENT = 5120  # samples that are routed together: 0.32 s, 16 frames of the embedding
MAIN = "shallow"  # the light path that the tables are about; the others are compared with it
SPEECH_SHARE, SILENCE_SHARE = 0.30, 0.80  # what the two thresholds send light: of speech files, and of silence


@dataclass(frozen=True)
class Work(WorkFolder):
    """One evaluation. data: sound like codec16k, keywords: words like kws16k, folder: for everything that is made.

    threads: of torch, in each process.
    """

    keywords: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = 1

    @cached_property
    def codec(self) -> SoundStream:
        return pretrained()

    def switched(self, variant: str = MAIN, seed: int = 0) -> Path:
        """The .dsl file of a retrofit: fine-tuned, and calibrated for SPEECH_SHARE."""
        return self.folder / "retrofit" / variant / f"seed{seed}.dsl"

    def net(self, variant: str = MAIN, seed: int = 0) -> nn.Module:
        """The codec with that retrofit in its encoder."""
        return dslify.load(self.switched(variant, seed), into=self.codec).eval()

    def thresholds(self, variant: str = MAIN, seed: int = 0) -> dict[str, float]:
        """By "speech" (SPEECH_SHARE of validation speech goes light) and "silence" (SILENCE_SHARE of silence)."""
        return {name: float(value) for name, value in self.read(f"thresholds/{variant}-{seed}.json").items()}
