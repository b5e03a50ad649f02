"""A lean causal SoundStream: convolutional encoder, residual vector quantizer, convolutional decoder.

    sound (batch, 1, samples) -> encoder -> (batch, 32, frames) -> quantizer -> decoder -> (batch, 1, samples)

The encoder follows SoundStream (arXiv 2107.03312): strided convolutions, residual units of a wide and a 1x1
convolution, ELU, everything causal. It differs where a Dynamic Switch Layer asks for it. What runs before the cut runs
for every input and so bounds every saving; hence two strided convolutions and nothing else up to `CUT`, and the
parameters and operations after it, at 100 and 50 frames per second. Kernels are short, so that a path that takes over
in the middle of a sound needs only 0.11 s of what came before. There is no normalisation of activations or of weights:
a frame depends on nothing but the samples before its end.

The decoder, of which no paper on switches asks anything, works at 100 frames per second and ends in an inverse Fourier
transform, as in Vocos (arXiv 2306.00814): a tenth of the work of transposed convolutions up to 16 kHz, so that the
codec can be trained on a processor.
"""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from vector_quantize_pytorch import ResidualVQ

CUT = "encoder.block1"
HOP = 320  # samples for one frame of the embedding
CHECKPOINT = Path(__file__).with_name("checkpoint.safetensors")


@dataclass(frozen=True)
class Stage:
    """One block: a resampling convolution, then residual units.

    channels: width of its output. stride: samples in for one sample out. kernel: size of the residual units' wide
    convolution. dilations: one residual unit for each.
    """

    channels: int
    stride: int
    kernel: int = 3
    dilations: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class SoundStreamConfig:
    """The shape of a codec; the defaults are the checkpoint's.

    The first encoder stage is the stem: a strided convolution alone. The strides multiply to 320: 50 frames per second
    at 16 kHz. width, blocks: of the decoder.
    """

    sample_rate: int = 16_000
    embedding: int = 32
    encoder: tuple[Stage, ...] = (
        Stage(16, 16, dilations=()),
        Stage(32, 5, dilations=()),
        Stage(64, 2, dilations=(1, 1)),
        Stage(48, 2),
    )
    width: int = 160
    blocks: int = 5
    quantizers: int = 8
    codebook_size: int = 512

    def __post_init__(self) -> None:
        hop = math.prod(stage.stride for stage in self.encoder)
        if hop != HOP:
            raise ValueError(f"the strides of the encoder have to multiply to {HOP}, got {hop}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> SoundStreamConfig:
        """The reverse of `to_json`; unknown keys raise TypeError."""

        def stages(rows: list[dict[str, Any]]) -> tuple[Stage, ...]:
            return tuple(Stage(**{**row, "dilations": tuple(row["dilations"])}) for row in rows)

        return cls(**{**fields, "encoder": stages(fields["encoder"])})


class CausalConv1d(nn.Conv1d):
    """Conv1d whose output frame n sees no input after the end of frame n.

    (batch, in, time) -> (batch, out, floor(time / stride)). Padded on the left only, by a number that does not depend
    on the input, so that torch.export can leave the time axis dynamic.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, dilation=dilation)
        self.left = (kernel - 1) * dilation + 1 - stride

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.left, 0)))


class ResidualUnit(nn.Module):
    """x + conv1x1(elu(conv(elu(x)))), (batch, channels, time) in and out."""

    def __init__(self, channels: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ELU(),
            CausalConv1d(channels, channels, kernel, dilation=dilation),
            nn.ELU(),
            nn.Conv1d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _block(resample: nn.Module, stage: Stage) -> nn.Sequential:
    units = (ResidualUnit(stage.channels, stage.kernel, dilation) for dilation in stage.dilations)
    # Runtimes fuse a leaky ReLU into the convolution before it; an ELU at the highest rate takes as long as that does.
    activation = nn.ELU() if stage.dilations else nn.LeakyReLU(0.2)
    return nn.Sequential(activation, resample, *units)


def build_encoder(config: SoundStreamConfig) -> nn.Sequential:
    """(batch, 1, samples) -> (batch, embedding, floor(samples / 320)); children stem, block1, block2, ..., head."""
    stem, *stages = config.encoder
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["stem"] = CausalConv1d(1, stem.channels, 2 * stem.stride, stride=stem.stride)
    width = stem.channels
    for number, stage in enumerate(stages, start=1):
        down = CausalConv1d(width, stage.channels, 2 * stage.stride, stride=stage.stride)
        parts[f"block{number}"] = _block(down, stage)
        width = stage.channels
    parts["head"] = nn.Sequential(nn.ELU(), nn.Conv1d(width, config.embedding, 1))
    return nn.Sequential(parts)


class SpectralBlock(nn.Module):
    """x + ConvNeXt: depthwise causal convolution, norm over the channels, two 1x1 layers; (batch, width, time)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left = 6
        self.mix = nn.Conv1d(width, width, 7, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        nn.init.normal_(self.down.weight, std=0.3 * (3 * width) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(F.pad(x, (self.left, 0))).transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.norm(mixed)))).transpose(1, 2)


class SpectralDecoder(nn.Module):
    """(batch, embedding, frames) -> (batch, 1, 320 * frames).

    Causal convolutions at 100 frames per second give magnitude and phase of a spectrum each, of which the inverse
    transforms are added up, windows of 40 ms every 10 ms. A sample thus waits for frames up to 20 ms after it.
    """

    window: Tensor

    def __init__(self, embedding: int, width: int, blocks: int) -> None:
        super().__init__()
        self.fft, self.step, self.width = 640, HOP // 2, width
        self.stem = CausalConv1d(embedding, 2 * width, 3)
        self.first = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(SpectralBlock(width) for _ in range(blocks)))
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.fft + 2)
        nn.init.normal_(self.head.weight, std=0.3 * width**-0.5)
        nn.init.constant_(self.head.bias[: self.fft // 2 + 1], -2.0)
        self.register_buffer("window", torch.hann_window(self.fft), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        twice = self.stem(x).unflatten(1, (self.width, 2)).transpose(2, 3).flatten(2)  # two frames for one
        hidden = self.blocks(self.first(twice.transpose(1, 2)).transpose(1, 2))
        level, phase = self.head(self.last(hidden.transpose(1, 2))).float().chunk(2, dim=-1)
        pieces = torch.fft.irfft(torch.polar(level.clamp(max=6.0).exp(), phase), n=self.fft) * self.window
        return self._added(pieces) / self._added(self.window.square().expand_as(pieces[:1])).clamp_min(1e-3)

    def _added(self, pieces: Tensor) -> Tensor:
        """Overlapping pieces (batch, frames, fft) as one sound, (batch, 1, step * frames)."""
        length = (pieces.shape[1] - 1) * self.step + self.fft
        whole = F.fold(pieces.transpose(1, 2), (1, length), (1, self.fft), stride=(1, self.step)).flatten(1)
        left = (self.fft - self.step) // 2
        return whole[:, None, left : left + pieces.shape[1] * self.step]


def _initialise(encoder: nn.Sequential) -> None:
    """Weights that keep the variance, no biases, quiet residual branches; sound of rms 0.1 becomes about 1 inside.

    With torch's own weights the biases drown so faint an input within a few layers: the decoder then learns to be
    silent before it learns that the embedding says anything.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Conv1d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    for module in encoder.modules():
        if isinstance(module, ResidualUnit):
            module.get_parameter("layers.3.weight").data.mul_(0.3)
    encoder.get_parameter("stem.weight").data.mul_(5.0)


class SoundStream(nn.Module):
    """The codec: (batch, 1, samples) -> the reconstruction, (batch, 1, samples).

    `encoder`, `quantizer` and `decoder` are its parts. The encoder exports whole, with batch and time dynamic; the
    quantizer does not, so a Dynamic Switch Layer is inserted with scope "encoder" at `CUT`.
    """

    hop = HOP
    encoder_segment_samples = 16_000

    def __init__(self, config: SoundStreamConfig | None = None) -> None:
        super().__init__()
        self.config = config or SoundStreamConfig()
        self.encoder = build_encoder(self.config)
        self.quantizer = ResidualVQ(
            dim=self.config.embedding,
            num_quantizers=self.config.quantizers,
            codebook_size=self.config.codebook_size,
            kmeans_init=True,
            kmeans_iters=10,
            decay=0.99,
            # In uses per batch: a small batch has about one frame for each code, so 1 would replace codes in use.
            threshold_ema_dead_code=0.05,
        )
        self.decoder = SpectralDecoder(self.config.embedding, self.config.width, self.config.blocks)
        _initialise(self.encoder)
        self.example_input_array = torch.zeros(1, 1, self.encoder_segment_samples)

    def embed(self, x: Tensor) -> Tensor:
        """(batch, 1, samples) -> (batch, embedding, ceil(samples / 320)); the last frame is filled up with zeros."""
        return self.encoder(F.pad(x, (0, -x.shape[-1] % self.hop)))

    def encode(self, x: Tensor) -> Tensor:
        """(batch, 1, samples) -> codes (batch, frames, quantizers), int64."""
        return self.quantizer(self.embed(x).transpose(1, 2))[1]

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (batch, frames, quantizers) -> (batch, 1, 320 * frames)."""
        return self.decoder(self.quantizer.get_output_from_indices(codes).transpose(1, 2))

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, 1, samples) -> the reconstruction and the commitment loss, the mean over all quantizers."""
        quantized, _, commitment = self.quantizer(self.embed(x).transpose(1, 2))
        return self.decoder(quantized.transpose(1, 2))[..., : x.shape[-1]], commitment.mean()

    def forward(self, x: Tensor) -> Tensor:
        return self.reconstruct(x)[0]


def pretrained() -> SoundStream:
    """The codec with the weights that lie beside this file, in eval mode.

    The environment variable SOUNDSTREAM_CHECKPOINT names another file of recipes.soundstream.train. The shape comes
    from the JSON file beside the weights, which also says what it was trained on, for how long and how well it does.
    """
    checkpoint = Path(os.environ.get("SOUNDSTREAM_CHECKPOINT", CHECKPOINT))
    note = json.loads(checkpoint.with_suffix(".json").read_text())
    model = SoundStream(SoundStreamConfig.from_json(note["config"]))
    model.load_state_dict(load_file(checkpoint))
    return model.eval()


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-accumulates for one second of sound in millions (convolutions; biases are free)."""

    params: int
    mmac_per_second: float


def encoder_costs(config: SoundStreamConfig | None = None, cut: str = CUT) -> dict[str, Cost]:
    """What each child of the encoder costs, then "base" (up to and with the cut) and "full" (the rest)."""
    config = config or SoundStreamConfig()
    with torch.device("meta"):
        encoder = build_encoder(config)
        costs: dict[str, Cost] = {}
        x = torch.zeros(1, 1, config.sample_rate)
        for name, child in encoder.named_children():
            with FlopCounterMode(display=False) as counter:
                x = child(x)
            costs[name] = Cost(sum(p.numel() for p in child.parameters()), counter.get_total_flops() / 2e6)
    border = list(costs).index(cut.rpartition(".")[2]) + 1
    children = list(costs.values())
    for name, part in (("base", children[:border]), ("full", children[border:])):
        costs[name] = Cost(sum(c.params for c in part), sum(c.mmac_per_second for c in part))
    return costs
