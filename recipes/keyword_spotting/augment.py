"""What training does to its clips: other speed, place, level and noise, SpecAugment, and words that are no keywords.

All of it works on a batch of sounds (batch, 1, samples) at once and draws from the generator given.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = 1600  # samples either way: 0.1 s
QUIETER, LOUDER = -12.0, 3.0  # dB
NOISY = 0.5  # share of the clips that get noise
NEAR, FAR = 0.0, 25.0  # dB, of the clip above the noise
SLOWEST, FASTEST = 0.88, 1.14  # of the speed
LEVEL = 0.05  # root mean square of a sound that is made
QUIET = 1e-5  # root mean square under which a noise counts as silence
BANDS, FRAMES = 7, 7  # most mel bands and frames that SpecAugment blanks at once (arXiv 1904.08779)
BLANKS = 1  # of either


def varied(sound: Tensor, noises: Tensor, generator: torch.Generator) -> Tensor:
    """A copy of the clips, each at another speed, moved in time, at another level and perhaps with a noise in it."""
    count, _, length = sound.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, 1, 1, generator=generator) * (high - low) + low

    moved = _moved(sound, uniform(SLOWEST, FASTEST), uniform(-SHIFT, SHIFT))
    chosen = torch.randint(0, len(noises), (count,), generator=generator)
    noise = noises[chosen].roll(int(torch.randint(0, length, (1,), generator=generator)), dims=2)
    wanted = _level(moved) * 10 ** (-uniform(NEAR, FAR) / 20)
    heard = torch.rand(count, 1, 1, generator=generator) < NOISY
    mixed = moved + heard * noise * wanted / _level(noise).clamp_min(QUIET)
    return (mixed * 10 ** (uniform(QUIETER, LOUDER) / 20)).clamp(-1.0, 1.0)


def _moved(sound: Tensor, speed: Tensor, shift: Tensor) -> Tensor:
    """Read each clip at another speed and from another place, by linear interpolation; silence outside."""
    length = sound.shape[2]
    centre = (length - 1) / 2
    places = (torch.arange(length) - centre) * speed + centre + shift
    grid = torch.stack([places / centre - 1, torch.zeros_like(places)], -1)
    return F.grid_sample(sound.unsqueeze(2), grid, mode="bilinear", padding_mode="zeros", align_corners=True).squeeze(2)


def other_words(sound: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
    """Speech that is none of the keywords, from keywords: half of them backwards, half with another word's end.

    classes: of the clips, (batch,); a clip whose partner says the same word is read backwards.
    """
    count, _, length = sound.shape
    partner = torch.randperm(count, generator=generator)
    middle = int(length * (0.4 + 0.2 * torch.rand((), generator=generator)))
    fade = ((torch.arange(length) - middle) / 400).clamp(0, 1)  # 25 ms
    joined = sound * (1 - fade) + sound[partner] * fade
    backwards = (torch.rand(count, generator=generator) < 0.5) | (classes == classes[partner])
    return torch.where(backwards[:, None, None], sound.flip(2), joined)


def other_sounds(noises: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Sounds without speech, (count, 1, samples): two of the noises over each other, at half to twice their speed and
    each with a swell of its own, or one alone."""
    made = torch.zeros(count, 1, noises.shape[2])
    for at in range(2):
        chosen = noises[torch.randint(0, len(noises), (count,), generator=generator)]
        speed = 2 ** (2 * torch.rand(count, 1, 1, generator=generator) - 1)
        shift = (2 * torch.rand(count, 1, 1, generator=generator) - 1) * noises.shape[2] / 2
        corners = torch.rand(count, 1, 5, generator=generator) ** 2  # of the loudness over the second
        swell = F.interpolate(corners, noises.shape[2], mode="linear", align_corners=True)
        sound = _moved(chosen, speed, shift) * swell
        level = (2 * torch.rand(count, 1, 1, generator=generator) - 1).clamp_min(0) if at else 1.0  # half have no other
        made += sound / _level(sound).clamp_min(QUIET) * level * LEVEL
    return made


def blanked(frames: Tensor, generator: torch.Generator) -> Tensor:
    """SpecAugment: some bands and some stretches of log-mel frames (batch, bands, frames) at the clip's mean."""
    mean = frames.mean((1, 2), keepdim=True)
    keep = torch.ones_like(frames, dtype=torch.bool)
    for _ in range(BLANKS):
        for axis, most in ((1, BANDS), (2, FRAMES)):
            size, count = frames.shape[axis], len(frames)
            width = torch.randint(0, most + 1, (count, 1), generator=generator)
            start = (torch.rand(count, 1, generator=generator) * (size - width)).long()
            places = torch.arange(size)
            inside = (places >= start) & (places < start + width)
            keep &= ~inside.unsqueeze(3 - axis)
    return torch.where(keep, frames, mean)


def _level(sound: Tensor) -> Tensor:
    """Root mean square of each clip: (batch, 1, 1)."""
    return sound.square().mean(2, keepdim=True).sqrt()
