"""Omega: which labels are positive, that is, worth the full path. Everything else a gate may stop."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import OptionError, some

_RANGE = re.compile(r"([0-9]{1,18})-([0-9]{1,18})")
_WHOLE = re.compile(r"([0-9]{1,18})(?:\.0+)?")  # a class index is "3", "03" as a folder's name, "3.0" in a float array


@dataclass(frozen=True)
class Word:
    """One word of a label map. text: as given. low, high: whole numbers that it names, None for a word that is no
    number. out: it takes labels out instead of adding them."""

    text: str
    low: int | None = None
    high: int | None = None
    out: bool = False

    def matches(self, label: str) -> bool:
        number = _WHOLE.fullmatch(label)
        if self.low is not None and self.high is not None and number:
            return self.low <= int(number[1]) <= self.high
        return label == self.text


@dataclass(frozen=True)
class Omega:
    """A label map (GC, arXiv 2303.08970): label -> positive or negative. Made by `omega`.

    It also decides labels that it was not made with, such as those of the test data: by the same words or callable.
    text: the words, or the callable's name.
    """

    text: str
    words: tuple[Word, ...] = ()
    decide: Callable[[str], Any] | None = None

    def __str__(self) -> str:
        return self.text

    def positive(self, labels: Sequence[str]) -> np.ndarray:
        """Which labels are positive: bool, (n,). Raises OptionError for a missing label ("" or None), and for a
        callable that raises or answers anything but true or false."""
        texts = [_text(label) for label in labels]
        missing = texts.count("")
        if missing:
            raise OptionError(
                f"{missing} of {len(texts)} samples have no label, so {self.text} cannot tell positive from negative; "
                "name folders by label, add a label column to manifest.csv, or give labels."
            )
        known = {text: self._one(text) for text in dict.fromkeys(texts)}
        return np.array([known[text] for text in texts], dtype=bool)

    def _one(self, label: str) -> bool:
        if self.decide is None:
            inside = self.words[0].out  # "!x" alone starts from everything
            for word in self.words:
                if word.matches(label):
                    inside = not word.out
            return inside
        try:
            answer = self.decide(label)
        except Exception as error:  # whatever the user's code raises is told as one sentence, with it as the cause
            reason = f"{type(error).__name__}: {str(error).rstrip('.')}"
            raise OptionError(f"The label map {self.text} failed for the label {label!r} ({reason}).") from error
        if not isinstance(answer, (bool, np.bool_)):
            raise OptionError(f"The label map {self.text} has to answer True or False; got {answer!r} for {label!r}.")
        return bool(answer)


def omega(words: str | Iterable[Any] | Callable[[str], Any], labels: Sequence[str]) -> Omega:
    """The label map that `words` mean for data with these labels.

    words: labels with commas between them ("yes,no,up"), ranges of whole-number labels ("1-9", "0,4-6"), what to leave
    out with an exclamation mark ("!background", "!background,!unknown", "1-9,!5": the later word decides); a set or any
    other iterable of labels, each taken literally; or a callable from label (a string) to True or False. A word that is
    itself a label means that label, whatever is in it. labels: one a sample, as in `Samples.labels`.

    Raises OptionError for words that match no label, for labels that are missing, and when all labels or none are
    positive.
    """
    present = {_text(label): None for label in labels}
    if isinstance(words, Omega):
        found = words
    elif isinstance(words, str):
        found = Omega(words, _parsed(words, present))
    elif callable(words):
        found = Omega(getattr(words, "__qualname__", type(words).__name__), decide=words)
    else:
        literal = tuple(_number_or_text(_text(word)) for word in words)
        found = Omega(",".join(sorted(word.text for word in literal)), literal)
        if not literal:
            raise OptionError(f"No label is named as positive; expected some of {some(list(present))}.")
    answers = found.positive(list(labels))
    if not present:
        raise OptionError(f"There are no samples, so {found.text} finds no label; give data with labels.")
    for word in found.words:
        if not any(word.matches(label) for label in present):
            raise OptionError(
                f"The positive labels name {word.text[:80]!r}, and no sample has it; the labels are "
                f"{some(sorted(present))}. Ranges such as 1-9 mean whole-number labels."
            )
    if answers.all() or not answers.any():
        which = "every label is" if answers.all() else "no label is"
        raise OptionError(
            f"With {found.text} {which} positive ({some(sorted(present))}); a gate needs samples of both kinds."
        )
    return found


def _parsed(words: str, present: dict[str, None]) -> tuple[Word, ...]:
    if words in present:
        return (Word(words),)
    parts = [part.strip() for part in words.split(",")]
    parts = [part for part in parts if part]
    if not parts:
        raise OptionError(f"No label is named as positive; expected some of {some(sorted(present))}.")
    parsed = tuple(_word(part, present) for part in parts)
    if parsed[0].out and not all(word.out for word in parsed):
        listed = ",".join(f"!{word.text}" for word in parsed)
        raise OptionError(
            f"{words!r} starts with what to leave out and goes on with labels to keep, which is not clear; write "
            f"{listed} to leave out all of them, or name what to keep first."
        )
    return parsed


def _word(part: str, present: dict[str, None]) -> Word:
    out = part.startswith("!") and part not in present
    text = part[1:].strip() if out else part
    span = _RANGE.fullmatch(text)
    if span is None or text in present:
        word = _number_or_text(text)
    else:
        low, high = int(span[1]), int(span[2])
        if low > high:
            raise OptionError(f"The range {text} runs backwards; write {high}-{low}.")
        word = Word(text, low, high)
    return Word(word.text, word.low, word.high, out)


def _number_or_text(text: str) -> Word:
    number = _WHOLE.fullmatch(text)
    return Word(text, int(number[1]), int(number[1])) if number else Word(text)


def _text(label: Any) -> str:
    return "" if label is None else str(label)
