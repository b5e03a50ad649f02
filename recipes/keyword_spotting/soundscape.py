"""Long sound made of clips: background with a word now and then, and where each word is.

A split holds few background clips (57 in the test part of kws16k, for an hour of sound), so they come varied: a piece
of two to five seconds is a clip as a loop from a place drawn anew, at another level, and half of the pieces have a
second clip in them. No stretch of the sound is an exact copy of another; it is still the same few recordings. Words are
taken as they are, each clip once before any comes twice, and lie between their own recording's silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dslify.errors import DataError, OptionError
from dslify.omega import Omega
from dslify.samples import Samples

from .data import NOISE
from .network import LENGTH, RATE

FADE = 400  # samples, 25 ms: where a word's clip begins and ends; all joins have equal power
JOIN = 4000  # samples, 0.25 s: from one background into the next; a shorter one sounds like a word's onset
LOOP = 1600  # samples, 0.1 s: from a background clip's end into its beginning
PIECE = (2.0, 5.0)  # s, of one background
GAIN = (-6.0, 6.0)  # dB, of a background clip
MIXED = 0.5  # share of the pieces with a second clip in them
BELOW = (-15.0, -3.0)  # dB, of the second clip's gain against the first's
APART = 1.5  # s of background between two words, at least
SHARE = 0.05  # of the time that are keywords, and as much other words


@dataclass(frozen=True)
class Word:
    """A clip with a word in the sound. start: s. keyword: whether its label is positive."""

    start: float
    label: str
    keyword: bool
    source: str

    @property
    def middle(self) -> float:
        """In s."""
        return self.start + LENGTH / RATE / 2


@dataclass(frozen=True, eq=False)
class Soundscape:
    """sound: (samples,) at RATE. words: in the order of their starts."""

    sound: Tensor
    words: tuple[Word, ...]

    @property
    def hours(self) -> float:
        return len(self.sound) / RATE / 3600

    @property
    def keywords(self) -> tuple[Word, ...]:
        return tuple(word for word in self.words if word.keyword)

    def windows(self, hop: float) -> Tensor:
        """One-second windows, one every `hop` seconds: (windows, 1, LENGTH), a view."""
        return self.sound.unfold(0, LENGTH, round(hop * RATE)).unsqueeze(1)

    def kinds(self, hop: float) -> np.ndarray:
        """What each window holds, (windows,): "keyword" or "unknown" where the middle of such a word lies in it."""
        count = (len(self.sound) - LENGTH) // round(hop * RATE) + 1
        starts = np.arange(count) * round(hop * RATE) / RATE
        found = np.full(count, "background", dtype="<U10")
        for word in self.words:
            inside = (starts <= word.middle) & (word.middle < starts + LENGTH / RATE)
            found[inside] = "keyword" if word.keyword else "unknown"
        return found


def composed(samples: Samples, omega: Omega, minutes: float, seed: int, share: float = SHARE) -> Soundscape:
    """So many minutes of the samples' background, with keywords for `share` of the time and other words for as much.

    samples: clips (1, LENGTH); what is labelled NOISE is background, other negatives are the other words. Raises
    DataError for samples without one of the three, OptionError for a time that has no room for one keyword and one
    other word, or a share that leaves none between the words.
    """
    count = round(share * minutes * 60)
    apart = int(APART * RATE)
    free = round(minutes * 60 * RATE) - 2 * count * LENGTH - (2 * count + 1) * apart
    if count < 1 or free < 0:
        raise OptionError(
            f"{minutes:g} minutes with {share:.0%} keywords and as many other words have no room for at least one of "
            f"each, {APART:g} s apart; take more minutes or another share than {share:g}."
        )
    generator = np.random.default_rng([seed, len(samples), count])
    positive = omega.positive(samples.labels)
    noise = np.array(samples.labels) == NOISE
    kinds = {"background": noise, "keyword": positive, "other word": ~positive & ~noise}
    for name, inside in kinds.items():
        if not inside.any():
            raise DataError(f"{samples.report.origin} holds no {name}, and a stream is made of all three kinds.")
    chosen = np.concatenate([_deck(np.flatnonzero(kinds[name]), count, generator) for name in list(kinds)[1:]])
    generator.shuffle(chosen)
    rests = np.diff(np.sort(generator.integers(0, free + 1, len(chosen))), prepend=0)
    starts = np.cumsum(rests + apart + LENGTH) - LENGTH
    sound = _background(samples, np.flatnonzero(noise), round(minutes * 60 * RATE), generator)
    words = []
    rise, fall = _fades(FADE)
    for start, at in zip(starts.tolist(), chosen.tolist(), strict=True):
        clip = samples[at][0].numpy()
        place = sound[start : start + LENGTH]
        joined = clip.copy()
        joined[:FADE] = clip[:FADE] * rise + place[:FADE] * fall
        joined[-FADE:] = clip[-FADE:] * fall + place[-FADE:] * rise
        place[:] = joined
        words.append(Word(start / RATE, samples.labels[at], bool(positive[at]), samples.sources[at]))
    return Soundscape(torch.from_numpy(sound.clip(-1, 1)), tuple(words))


def _deck(places: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """So many of the places, each once before any comes again."""
    rounds = [generator.permutation(places) for _ in range(-(-count // len(places)))]
    return np.concatenate(rounds)[:count]


def _background(samples: Samples, places: np.ndarray, length: int, generator: np.random.Generator) -> np.ndarray:
    """(length,), pieces joined with fades."""
    sound = np.zeros(length + 2 * int(PIECE[1] * RATE), np.float32)
    rise, fall = _fades(JOIN)
    end = JOIN
    for piece in _pieces(samples, places, generator):
        begin = end - JOIN
        sound[begin:end] = sound[begin:end] * fall + piece[:JOIN] * rise
        end = begin + len(piece)
        sound[begin + JOIN : end] = piece[JOIN:]
        if end >= length + 2 * JOIN:
            break
    return sound[JOIN : length + JOIN]


def _pieces(samples: Samples, places: np.ndarray, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Varied pieces of background without end."""
    while True:
        for first in generator.permutation(places):
            size = int(generator.uniform(*PIECE) * RATE)
            level = generator.uniform(*GAIN)
            piece = _looped(samples[int(first)][0].numpy(), size, level, generator)
            if generator.random() < MIXED:
                other = int(generator.choice(places))
                below = level + generator.uniform(*BELOW)
                piece = piece + _looped(samples[other][0].numpy(), size, below, generator)
            yield piece


def _looped(clip: np.ndarray, size: int, level: float, generator: np.random.Generator) -> np.ndarray:
    """The clip as a loop whose end fades into its beginning, from a place drawn anew: (size,)."""
    rise, fall = _fades(LOOP)
    loop = clip[:-LOOP].copy()
    loop[:LOOP] = clip[:LOOP] * rise + clip[-LOOP:] * fall
    begin = int(generator.integers(len(loop)))
    loop = np.roll(loop, -begin) * np.float32(10 ** (level / 20))
    return np.resize(loop, size)


def _fades(size: int) -> Sequence[np.ndarray]:
    """Factors of what comes and of what goes, (size,): their squares sum to 1."""
    phase = (np.arange(size, dtype=np.float32) + 0.5) / size * np.float32(np.pi / 2)
    return np.sin(phase), np.cos(phase)
