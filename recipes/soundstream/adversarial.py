"""A critic of spectra for the second phase of the codec's training, and the losses of both sides.

As in SoundStream (arXiv 2107.03312, section III-E): the critic sees the complex spectrum, hinge losses, and the codec
is also drawn to the critic's own features of the original. Small, so that a step can be taken on a processor.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

LEAK = 0.2
Judged = tuple[Tensor, list[Tensor]]  # (scores, features of every layer)


class SpectrumCritic(nn.Module):
    """(batch, 1, samples) -> scores (batch, 1, bands, frames), above 0 for real sound, and the features before it."""

    window: Tensor

    def __init__(self, fft: int, channels: Sequence[int] = (12, 16, 24, 32)) -> None:
        super().__init__()
        self.fft = fft
        self.register_buffer("window", torch.hann_window(fft), persistent=False)
        layers = []
        for before, after in itertools.pairwise((2, *channels)):
            time = 2 if before == channels[0] else 1
            layers.append(weight_norm(nn.Conv2d(before, after, (5, 3), stride=(2, time), padding=(2, 1))))
        self.layers = nn.ModuleList(layers)
        self.head = weight_norm(nn.Conv2d(channels[-1], 1, 3, padding=1))

    def forward(self, x: Tensor) -> Judged:
        level = x.square().mean(dim=(1, 2), keepdim=True).sqrt() + 1e-3
        spectrum = torch.stft((x / level).squeeze(1), self.fft, self.fft // 4, window=self.window, return_complex=True)
        hidden = torch.view_as_real(spectrum).movedim(-1, 1) / self.fft**0.5
        features = []
        for layer in self.layers:
            hidden = F.leaky_relu(layer(hidden), LEAK)
            features.append(hidden)
        return self.head(hidden), features


class Critic(nn.Module):
    """Several windows at once: (batch, 1, samples) -> one judgement for each."""

    def __init__(self, sizes: Sequence[int] = (256, 1024)) -> None:
        super().__init__()
        self.of = nn.ModuleList(SpectrumCritic(fft) for fft in sizes)

    def forward(self, x: Tensor) -> list[Judged]:
        return [critic(x) for critic in self.of]


def critic_loss(real: Sequence[Judged], fake: Sequence[Judged]) -> Tensor:
    """Hinge: real sound is to score above 1, reconstructions below -1."""
    terms = [
        F.relu(1.0 - one).mean() + F.relu(1.0 + other).mean() for (one, _), (other, _) in zip(real, fake, strict=True)
    ]
    return torch.stack(terms).mean()


def codec_losses(real: Sequence[Judged], fake: Sequence[Judged]) -> dict[str, Tensor]:
    """`adversarial`: hinge. `feature`: mean absolute difference of features, relative to those of the original."""
    adversarial = torch.stack([F.relu(1.0 - score).mean() for score, _ in fake]).mean()
    apart = [
        (one.detach() - other).abs().mean() / one.detach().abs().mean().clamp_min(1e-4)
        for (_, ours), (_, theirs) in zip(real, fake, strict=True)
        for one, other in zip(ours, theirs, strict=True)
    ]
    return {"adversarial": adversarial, "feature": torch.stack(apart).mean()}
