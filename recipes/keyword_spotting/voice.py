"""Energy-based voice activity detection: what a keyword spotter without gates is usually put behind.

Frame energies in dB are held against a noise floor that follows the sound: the smallest smoothed energy of the last
MEMORY seconds (minimum statistics, Martin 2001). A window's score is how far LOUD of its frames rise above the floor; a
window under the threshold is not given to the network. sox's detector (torchaudio.functional.vad) trims the front of a
recording and has no such score; learned ones compute more for a second than the networks of this recipe.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from dslify.errors import DataError
from dslify.guarantee import hoeffding_bentkus, profile

from .network import LENGTH, RATE
from .soundscape import Soundscape

FRAME = 160  # samples, 10 ms
SMOOTH = 5  # frames, of what the floor is the smallest of
MEMORY = 2.0  # s
LOUD = 8  # frames of a window that have to rise above the floor: 80 ms, more than a click has
QUIETEST = -75.0  # dB re 1: digital silence
MACS = RATE  # of the energies of a second


def energies(sound: Tensor) -> np.ndarray:
    """dB re 1 of each frame of (samples,)."""
    frames = sound[: len(sound) // FRAME * FRAME].view(-1, FRAME).double()
    return np.maximum(10 * np.log10(frames.square().mean(1).numpy() + 1e-12), QUIETEST)


def window_scores(sound: Tensor, starts: np.ndarray) -> np.ndarray:
    """dB above the floor of the window of one second that begins at each of the samples, (windows,).

    The floor of a window knows the sound up to the window's end and no further. sound: (samples,).
    """
    level = energies(sound)
    smooth = np.convolve(level, np.full(SMOOTH, 1 / SMOOTH), mode="same")
    length, memory = LENGTH // FRAME, round(MEMORY * RATE) // FRAME
    scores = np.empty(len(starts))
    for at, start in enumerate(starts // FRAME):
        end = start + length
        inside = np.partition(level[start:end], -LOUD)[-LOUD]
        scores[at] = inside - smooth[max(0, end - memory) : end].min()
    return scores


def highest_threshold(scores: np.ndarray, lost: np.ndarray, most: float, confidence: float) -> float:
    """The highest threshold under which, with this confidence, at most `most` of new keywords are lost.

    scores: of keyword clips, one a unit, (n,). lost: whether stopping that clip changes the answer, (n,) bool. Risk
    rises with the threshold, so it is the last one before a bound is passed for the first time (Bates et al.,
    arXiv 2101.02703). Raises DataError for too few clips.
    """
    found = profile(lost.astype(float), scores)
    bounded = hoeffding_bentkus(found.mean, np.full(len(found.mean), found.total), most) <= 1 - confidence
    good = int(np.argmin(bounded)) if not bounded.all() else len(bounded)
    if good == 0:
        raise DataError(
            f"{found.total} keyword clips cannot promise at most {most:.1%} lost at {confidence:.0%} confidence; give "
            "more of them, or promise less."
        )
    ordered = np.concatenate([np.sort(scores), [np.inf]])
    return float(ordered[found.light[good - 1]])


class VoiceGated(nn.Module):
    """A network behind a detector: windows without voice are answered with "no keyword" and are not computed.

    It hears windows (1, 1, LENGTH) of a sound one after the other, every `hop` s, and keeps the floor in between.
    """

    nothing: Tensor

    def __init__(self, network: nn.Module, threshold: float, hop: float, classes: int):
        super().__init__()
        self.network, self.threshold = network, threshold
        self.new = round(hop * RATE)
        self.register_buffer("nothing", torch.tensor([[20.0] + [0.0] * (classes - 1)]))
        self.heard = torch.zeros(0)

    def forward(self, window: Tensor) -> Tensor:
        fresh = window[0, 0] if not len(self.heard) else window[0, 0, -self.new :]
        self.heard = torch.cat([self.heard, fresh])[-max(round(MEMORY * RATE), LENGTH) :]
        score = window_scores(self.heard, np.array([len(self.heard) - LENGTH]))[0]
        answer: Tensor = self.nothing if score < self.threshold else self.network(window)
        return answer


def calibrated(network: nn.Module, scape: Soundscape, most: float, confidence: float) -> float:
    """The threshold for a stream's keywords: a clip with its keyword is one window, heard after what precedes it.

    A keyword that the network itself takes for none is not lost by the detector.
    """
    starts = np.array([round(word.start * RATE) for word in scape.keywords])
    clips = torch.stack([scape.sound[start : start + LENGTH] for start in starts.tolist()])[:, None]
    with torch.no_grad():
        answers = torch.cat([network(part) for part in clips.split(64)]).argmax(1).numpy()
    return highest_threshold(window_scores(scape.sound, starts), answers > 0, most, confidence)
