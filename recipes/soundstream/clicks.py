"""Is a change of path heard? Energy in the 10 ms around the borders at which a routed sound changes path.

A click is a step or a kink: it shows in the second difference of the sound, whose energy there is compared with that of
always full at the same places. Since the light path's sound has another energy without any border, it is also compared
with what the two paths have there alone, each on its own side. And the test has to see a click to mean anything: a hard
cut between the two decoded sounds is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dslify.resampling import Resample
from recipes.soundstream.routes import Light, changes
from recipes.soundstream.work import SEGMENT

HALF = 80  # samples, 5 ms, on either side of a border
FLOOR = 1e-12  # mean square of a second difference, under that of 16-bit rounding

Wave = NDArray[np.float32]
Squares = NDArray[np.float64]


@dataclass(frozen=True)
class Borders:
    """Mean squares around every change of path of one sound, (borders,) each.

    full, routed, cut: of the second difference of always full, of the routed sound and of a hard cut. own: of the path
    before the border up to it and of the path after it from there on, each from the sound that is that path's alone.
    apart, inside: of routed minus full relative to full, at the border and mid-way in the light segment beside it.
    """

    full: Squares
    routed: Squares
    cut: Squares
    own: Squares
    apart: Squares
    inside: Squares


def borders(full: Wave, routed: Wave, light: Wave, taken: Light) -> Borders:
    """Of one sound, three times (samples,), whose segments went light where `taken` says so."""
    found = changes(taken)
    at = found * SEGMENT
    middle = np.minimum(np.where(taken[found], at + SEGMENT // 2, at - SEGMENT // 2), len(full) - 1)
    goes = np.repeat(taken, SEGMENT)[: len(full)]
    # A second difference reads three samples; the last one decides whose it is.
    own = np.where(goes[2:], np.diff(light.astype(np.float64), 2), np.diff(full.astype(np.float64), 2))
    kinks = [np.diff(wave.astype(np.float64), 2) for wave in (full, routed, np.where(goes, light, full))]
    of_full, of_routed, of_cut, of_own = (_around(wave, at - 1) for wave in (*kinks, own))
    whole = full.astype(np.float64)
    apart, inside = (_around(routed - whole, where) / (_around(whole, where) + FLOOR) for where in (at, middle))
    return Borders(of_full, of_routed, of_cut, of_own, apart, inside)


def _around(wave: Squares, places: NDArray[np.int64]) -> Squares:
    """Mean square of HALF samples on either side of each place."""
    return np.array([np.mean(wave[max(0, at - HALF) : at + HALF] ** 2) for at in places])


def excess(sounds: Sequence[Borders]) -> dict[str, Any]:
    """The borders of many sounds in figures, each with its interval from a bootstrap over the sounds.

    "A over B": energy in dB, the mean over the borders, where a quiet border counts as much as a loud one; with
    "energy" of all borders together as a ratio. "borders": their number; no more where there are none.
    """
    columns = {field.name: np.concatenate([getattr(each, field.name) for each in sounds]) for field in fields(Borders)}
    source = np.repeat(np.arange(len(sounds)), [len(each.full) for each in sounds])
    found: dict[str, Any] = {"borders": len(source)}
    if not len(source):
        return found
    resample = Resample(source, len(sounds), seed=0)
    pairs = (("routed", "full"), ("routed", "own"), ("own", "full"), ("cut", "own"), ("apart", "inside"))
    for above, below in pairs:
        top, bottom = columns[above] + FLOOR, columns[below] + FLOOR
        each = 10 * np.log10(top / bottom)
        found[f"{above} over {below}"] = {
            "value": float(each.mean()),
            "interval": resample.interval(resample.means(each)),
            "energy": float(top.sum() / bottom.sum()),
        }
    return found
