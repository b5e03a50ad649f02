"""Distances between sounds in the spectrum: what the codec is trained on and judged by.

Log-mel distances have a floor and every clip has a weight. Without them the gradient of silence, whose logarithms
move most for the least energy, drowns that of speech.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LOG_FLOOR = 1e-4  # in units of a full-scale sine: -80 dB
QUIET_RMS = 0.02  # clips below it count for less,
QUIET_WEIGHT = 0.2  # but never for less than this


def mel_filters(bands: int, fft: int, sample_rate: int) -> Tensor:
    """(fft // 2 + 1, bands): triangles, evenly spaced on the mel scale, each summing to 1.

    A triangle narrower than one bin would be empty; it is widened to the bins next to its centre.
    """
    top = 2595.0 * math.log10(1.0 + sample_rate / 2 / 700.0)
    edges = 700.0 * (10.0 ** (torch.linspace(0.0, top, bands + 2) / 2595.0) - 1.0)
    bins = torch.linspace(0.0, sample_rate / 2, fft // 2 + 1)[:, None]
    spacing = sample_rate / fft
    centre = edges[1:-1]
    rise = (centre - edges[:-2]).clamp(min=spacing)
    fall = (edges[2:] - centre).clamp(min=spacing)
    filters = torch.minimum((bins - centre) / rise + 1.0, (centre - bins) / fall + 1.0).clamp(min=0.0)
    return filters / filters.sum(dim=0)


class Spectrum(nn.Module):
    """(batch, 1, samples) -> magnitudes (batch, fft // 2 + 1, frames) and mel bands (batch, bands, frames).

    A sine of amplitude 1 has the magnitude 1 at every size of window.
    """

    window: Tensor
    mel: Tensor

    def __init__(self, fft: int, bands: int, sample_rate: int = 16_000) -> None:
        super().__init__()
        self.fft = fft
        window = torch.hann_window(fft)
        self.register_buffer("window", window * (2.0 / window.sum()))
        self.register_buffer("mel", mel_filters(bands, fft, sample_rate).T.contiguous())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spectrum = torch.stft(
            x.squeeze(1), self.fft, self.fft // 4, window=self.window, pad_mode="constant", return_complex=True
        )
        # abs() has no gradient at 0, which is where digital silence lies.
        magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-14).sqrt()
        return magnitude, self.mel @ magnitude


def clip_weights(x: Tensor) -> Tensor:
    """(batch, 1, samples) -> (batch,) with mean 1: how much each clip's log-mel distance counts."""
    rms = x.square().mean(dim=(1, 2)).sqrt()
    weights = (rms / QUIET_RMS).clamp(QUIET_WEIGHT, 1.0)
    return weights / weights.mean()


class ReconstructionLoss(nn.Module):
    """Log-mel and relative linear magnitude over several windows, and a little waveform: target, output -> terms.

    Each term is a scalar. `mel` is a mean absolute difference of natural logarithms, the other two are relative to
    the target's own mean, so that 1 is what an output of zeros gets.
    """

    def __init__(self, scales: tuple[tuple[int, int], ...] = ((256, 32), (512, 48), (1024, 80))) -> None:
        super().__init__()
        self.spectra = nn.ModuleList(Spectrum(fft, bands) for fft, bands in scales)

    def forward(self, target: Tensor, output: Tensor) -> dict[str, Tensor]:
        weights = clip_weights(target)
        mel = linear = torch.zeros((), device=target.device)
        for spectrum in self.spectra:
            with torch.no_grad():
                wanted, wanted_mel = spectrum(target)
            got, got_mel = spectrum(output)
            difference = ((got_mel + LOG_FLOOR).log() - (wanted_mel + LOG_FLOOR).log()).abs()
            mel = mel + (weights * difference.mean(dim=(1, 2))).mean()
            scale = wanted.mean(dim=(1, 2)) + LOG_FLOOR
            linear = linear + ((got - wanted).abs().mean(dim=(1, 2)) / scale).mean()
        wave = (output - target).abs().mean(dim=(1, 2)) / (target.abs().mean(dim=(1, 2)) + 10 * LOG_FLOOR)
        scales = len(self.spectra)
        return {"mel": mel / scales, "linear": linear / scales, "wave": wave.mean()}


class LogMelDistance(nn.Module):
    """The figure reported: mean absolute log-mel difference in dB for each clip, (batch,); no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = Spectrum(1024, 80)

    def forward(self, target: Tensor, output: Tensor) -> Tensor:
        logs = [(self.spectrum(x)[1] + LOG_FLOOR).log10() for x in (target, output)]
        return 20.0 * (logs[0] - logs[1]).abs().mean(dim=(1, 2))
