"""Fourier transforms as convolutions: the same pairs of numbers, and nothing complex left."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from dslify.functional import op_name
from dslify.spectra import real_spectra
from recipes.keyword_spotting.network import LogMel

ROUNDING = 2e-6  # of the largest value: float32 sums in another order


class Spectrum(nn.Module):
    """Pairs of real numbers, or the magnitudes of the complex ones."""

    def __init__(self, pairs: bool = True, **settings: object):
        super().__init__()
        self.pairs, self.settings = pairs, settings
        window = settings.pop("window", None)
        self.register_buffer("window", window)

    def forward(self, sound: Tensor) -> Tensor:
        found = torch.stft(sound, window=self.window, return_complex=True, **self.settings)
        return torch.view_as_real(found) if self.pairs else found.abs()


def graph_of(module: nn.Module, sound: Tensor) -> fx.GraphModule:
    return torch.export.export(module.eval(), (sound,)).module()


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_the_keyword_networks_front_end_stays_what_it_is():
    sound = torch.randn(2, 1, 16000, generator=torch.Generator().manual_seed(0))
    graph = graph_of(LogMel(), sound)
    wanted = graph(sound)
    assert real_spectra(graph) == 1
    assert not [node for node in graph.graph.nodes if "stft" in op_name(node) or "real" in op_name(node)]
    assert off(graph(sound), wanted) < ROUNDING


@settings(max_examples=12, deadline=None)
@given(
    length=st.integers(8, 40), hop=st.integers(1, 40), missing=st.integers(0, 5), normalized=st.booleans(),
    onesided=st.booleans(), single=st.booleans(),
)  # fmt: skip
def test_every_setting_of_stft(length: int, hop: int, missing: int, normalized: bool, onesided: bool, single: bool):
    generator = torch.Generator().manual_seed(length)
    window = torch.rand(length - missing, generator=generator) + 0.1
    kinds = {"normalized": normalized, "onesided": onesided, "center": False}
    module = Spectrum(n_fft=length, hop_length=hop, win_length=length - missing, window=window, **kinds)
    sound = torch.randn((150,) if single else (3, 150), generator=generator)
    graph = graph_of(module, sound)
    wanted = graph(sound)
    assert real_spectra(graph) == 1
    found = graph(sound)
    assert found.shape == wanted.shape
    assert off(found, wanted) < ROUNDING


@pytest.mark.parametrize("center", [True, False])
def test_complex_numbers_that_are_read_are_left(center: bool):
    window = torch.hann_window(32)
    graph = graph_of(Spectrum(False, n_fft=32, hop_length=8, window=window, center=center), torch.randn(2, 200))
    assert real_spectra(graph) == 0
    assert [node for node in graph.graph.nodes if "stft" in op_name(node)]
