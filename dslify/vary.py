"""Varied copies of samples: sound moved in time, at other speeds and levels and with noise in it, or what a user's own
function makes of anything else.

Few samples teach a gate little, and a threshold that is set on few does not hold for new speakers. A copy is computed
when it is read and is a function of the seed, its original's number and its own alone: it is the same whenever, in
whatever batch and beside how many others it is read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy
import torch
from torch import Generator, Tensor

from .errors import DataError, OptionError, one_line
from .samples import Samples, level, raw_bytes, shaped
from .wanted import DEFAULT_RATE

Variation = Callable[[Tensor, Generator], Tensor]  # (batch, generator of random numbers) -> a batch of the same shape

SHIFT = 0.1  # seconds, either way
SLOWEST, FASTEST = 0.9, 1.1  # of the speed; the pitch goes with it
QUIETER, LOUDER = -12.0, 3.0  # dB
NOISY = 0.5  # share of the copies that get noise
NEAR, FAR = 0.0, 25.0  # dB, of the sound above the noise
BACKGROUND = ("background", "_background_noise_", "noise")  # labels of what is mixed in when no noise is given
COLOURED = 64  # noises that are made where there are none
STEEPEST = 2.0  # exponent of 1 / frequency in the power of a made noise: white, pink, brown
LEAST = 1000  # entries of one sample; fewer are taken for features and no sound
MOST_CHANNELS = 8


@dataclass(frozen=True, eq=False)
class SoundVariation:
    """Sound (batch, channels, samples) or (batch, samples) as it might have been recorded another time.

    Each is read at another speed (by linear interpolation), moved in time and given another level; half of them are
    mixed with a stretch of one of `noises`, (channels or 1, samples) each. Outside of the recording is silence.
    rate: Hz. peak: amplitude at which sound is clipped.
    """

    noises: Samples | Tensor = field(repr=False)
    rate: int = DEFAULT_RATE
    peak: float = 1.0

    def __call__(self, batch: Tensor, generator: Generator) -> Tensor:
        return torch.stack([self._one(sound, generator) for sound in batch])

    def _one(self, sound: Tensor, generator: Generator) -> Tensor:
        speed, shift, gain, heard, near, which, start = torch.rand(7, generator=generator).tolist()
        moved = self._moved(sound.numpy(), _between(SLOWEST, FASTEST, speed), _between(-SHIFT, SHIFT, shift))
        if heard < NOISY:
            noise = self.noises[int(which * len(self.noises))].numpy()
            begin = int(start * noise.shape[-1])
            stretch = noise.take(numpy.arange(begin, begin + moved.shape[-1]), axis=-1, mode="wrap")
            if loud := _level(stretch):
                moved = moved + stretch * (_level(moved) / loud * _amplitude(-_between(NEAR, FAR, near)))
        varied = moved * _amplitude(_between(QUIETER, LOUDER, gain))
        return torch.from_numpy(varied.clip(-self.peak, self.peak))

    def _moved(self, sound: numpy.ndarray, speed: float, seconds: float) -> numpy.ndarray:
        """At that many times the speed and that much later, with its middle otherwise where it was."""
        length = sound.shape[-1]
        middle, heard = (length - 1) / 2, numpy.arange(length, dtype=numpy.float64)
        places = (heard - middle - seconds * self.rate) * speed + middle
        moved = numpy.empty_like(sound)
        for into, channel in zip(moved.reshape(-1, length), sound.reshape(-1, length), strict=True):
            into[:] = numpy.interp(places, heard, channel, left=0, right=0)
        return moved

    def key(self) -> str:
        """What a copy is a function of, besides the original, the seed and the number of the copy."""
        noises = self.noises
        found = noises.digest() if isinstance(noises, Samples) else hashlib.blake2b(raw_bytes(noises)).hexdigest()
        return f"sound {self.rate} {self.peak} {found}"


@dataclass(frozen=True)
class OwnVariation:
    """A function of the user's, held to what it has to return: finite values of the same shape and type."""

    function: Variation

    def __call__(self, batch: Tensor, generator: Generator) -> Tensor:
        try:
            found = self.function(batch, generator)
        except OptionError:
            raise
        except Exception as error:  # whatever the user's code raises is told as one sentence, with it as the cause
            raise OptionError(
                f"{self.key()} failed on a batch of {shaped(batch.shape)} ({one_line(error)})."
            ) from error
        if not isinstance(found, Tensor) or (found.shape, found.dtype) != (batch.shape, batch.dtype):
            what = f"{shaped(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise OptionError(
                f"{self.key()} made {what} of a batch of {shaped(batch.shape)} {batch.dtype}; expected a batch of the "
                "same shape and type."
            )
        if found.is_floating_point() and not torch.isfinite(found).all():
            raise OptionError(f"{self.key()} made values that are not finite; expected a batch of plain numbers.")
        return found.detach()

    def key(self) -> str:
        return f"the variation {getattr(self.function, '__qualname__', type(self.function).__name__)}"


@dataclass(frozen=True, eq=False)
class VariedSamples(Samples):
    """Samples and copies of them. copy: (n,), the number of each copy, 0 for the original itself."""

    copy: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long), repr=False)
    how: SoundVariation | OwnVariation | None = field(default=None, repr=False)
    seed: int = 0

    def __getitem__(self, at: int) -> Tensor:
        return self._read(int(self.index[at]), int(self.copy[at]))

    def batch(self, positions: Sequence[int] | Tensor) -> Tensor:
        where = torch.as_tensor(positions)
        pairs = zip(self.index[where].tolist(), self.copy[where].tolist(), strict=True)
        return torch.stack([self._read(row, number) for row, number in pairs])

    def subset(self, positions: Sequence[int]) -> Samples:
        chosen = list(positions)
        return replace(super().subset(chosen), copy=self.copy[torch.tensor(chosen, dtype=torch.long)])  # type: ignore[call-arg]

    def digest(self) -> str:
        """One hash of the originals, of which copies there are, and of how they are made."""
        kind = "" if self.how is None else self.how.key()
        first = next((at for at, number in enumerate(self.copy.tolist()) if number), None)
        made = b"" if first is None else raw_bytes(self[first])  # tells one version of a user's function from another
        told = f"{super().digest()} {self.seed} {kind} {self.copy.tolist()}".encode() + made
        return hashlib.blake2b(told, digest_size=16).hexdigest()

    @cached_property
    def rms_db(self) -> Tensor:  # type: ignore[override]
        """Reads every copy, at the first call."""
        found = [level(self[at]) if number else None for at, number in enumerate(self.copy.tolist())]
        known = self.levels.tolist()
        return torch.tensor([old if new is None else new for old, new in zip(known, found, strict=True)])

    def _read(self, row: int, number: int) -> Tensor:
        value = self.values[row]
        if not number or self.how is None:
            return value.clone()
        own = hashlib.blake2b(f"{self.seed}/{row}/{number}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(own, "big"))
        return self.how(value.unsqueeze(0), generator)[0]


def vary(
    samples: Samples,
    copies: int,
    *,
    noises: Samples | Tensor | None = None,
    seed: int = 0,
    with_: Variation | None = None,
) -> Samples:
    """The samples, then `copies` varied copies of each, with the labels and sources of their originals.

    Of sound, (channels, samples) or (samples,): moved by up to 0.1 s, 10 % faster or slower, 12 dB quieter to 3 dB
    louder, half of the copies with noise 0 to 25 dB below them. noises: to mix in, other samples or (n, channels or 1,
    samples); when not given, the samples that are labelled background or noise, else coloured noise that is made.
    with_: for other data, (batch, torch.Generator) -> a batch of the same shape and type; it gets one sample at a time,
    (1, *shape), and takes all that is random from the generator.
    `originals` of the result tells which samples belong together. Copies are computed when they are read.

    Raises OptionError for a number of copies under 0, and where `with_` returns anything else; DataError for samples
    that are no sound, without `with_`, for noises that do not fit, and for samples that hold copies already.
    """
    if copies < 0:
        raise OptionError(f"copies is 0 or more; got {copies}.")
    if isinstance(samples, VariedSamples):
        raise DataError(
            f"{samples.report.origin} holds varied copies already; vary the samples that they are copies of."
        )
    if with_ is not None and noises is not None:
        raise OptionError("noises are mixed into sound; a variation of your own mixes in what it wants.")
    if copies == 0:
        return samples
    how: SoundVariation | OwnVariation
    how, words = (OwnVariation(with_), ()) if with_ is not None else _sound(samples, noises, seed)
    count, times = len(samples), 1 + copies
    words = (f"{count} samples and {copies} varied cop{'y' if copies == 1 else 'ies'} of each", *words)
    report = replace(samples.report, samples=count * times, notes=(*samples.report.notes, *words))
    return VariedSamples(
        samples.values,
        samples.index.repeat(times),
        samples.labels * times,
        samples.sources * times,
        samples.names + tuple(f"{name} (copy {at})" for at in range(1, times) for name in samples.names),
        samples.levels.repeat(times),
        report,
        samples.classes,
        torch.arange(times).repeat_interleave(count),
        how,
        seed,
    )


def _sound(samples: Samples, noises: Samples | Tensor | None, seed: int) -> tuple[SoundVariation, tuple[str, ...]]:
    """How sound is varied, and remarks. Raises DataError for samples that are no sound."""
    shape, dtype = samples.shape, samples.values.dtype
    channels = shape[0] if len(shape) == 2 else 1
    if len(shape) not in (1, 2) or dtype != torch.float32 or channels > MOST_CHANNELS or shape[-1] < LEAST:
        raise DataError(
            f"{samples.report.origin} holds samples of {shaped(shape)} {dtype}, which are no sound; say how a copy is "
            "made of them: vary(..., with_=function), or --vary pkg.mod:function, with (batch, generator) -> batch."
        )
    rate = samples.report.rate
    words = () if rate else (f"varied as sound at {DEFAULT_RATE} Hz; give the rate if it is another",)
    if noises is None:
        found = [at for at, label in enumerate(samples.labels) if label in BACKGROUND]
        noises = samples.subset(found) if found else _coloured(shape, seed)
        what = f"of the {len(found)} labelled {samples.labels[found[0]]}" if found else "that was made (white to brown)"
    else:
        what = f"of {noises.report.origin}" if isinstance(noises, Samples) else "that was given"
    _check(noises, shape)
    peak = max(1.0, max(samples[at].abs().max().item() for at in range(len(samples))))
    return SoundVariation(noises, rate or DEFAULT_RATE, peak), (*words, f"mixed into half of the copies: noise {what}")


def _check(noises: Samples | Tensor, shape: tuple[int, ...]) -> None:
    """Raises DataError for noises that cannot be mixed into sound of this shape."""
    own = tuple(noises.shape) if isinstance(noises, Samples) else tuple(noises.shape[1:])
    fits = len(own) == len(shape) and own[:-1] in (shape[:-1], (1,)) and min(len(noises), own[-1]) > 0
    dtype = noises.values.dtype if isinstance(noises, Samples) else noises.dtype
    if not fits or dtype != torch.float32:
        raise DataError(
            f"The {len(noises)} noises are {shaped(own)} {dtype}, and the sound is {shaped(shape)}; expected at least "
            "one of as many channels, or of one, in float32."
        )


def _coloured(shape: tuple[int, ...], seed: int) -> Tensor:
    """Noises from white to brown for sound of this shape, (COLOURED, samples) or (COLOURED, 1, samples)."""
    length = shape[-1]
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.fft.rfft(torch.randn(COLOURED, length, generator=generator))
    steep = torch.linspace(0, STEEPEST / 2, COLOURED)[:, None]  # of the amplitude
    frequency = torch.arange(spectrum.shape[1]).clamp_min(1)
    noise = torch.fft.irfft(spectrum * frequency**-steep, length)
    return noise.reshape(COLOURED, *(1 for _ in shape[1:]), length)


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share


def _amplitude(decibels: float) -> float:
    return 10 ** (decibels / 20)


def _level(sound: numpy.ndarray) -> float:
    """Root mean square."""
    return math.sqrt(float(numpy.square(sound).mean()))
