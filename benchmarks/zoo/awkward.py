"""Networks of our own, each awkward in its way; those of tests/zoo.py are in as well."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from tests.zoo import ZOO

from .network import Network, noise

CHANNELS = 24


class Recurrent(nn.Module):
    """Convolutions around a recurrent layer, with a residual path past it."""

    def __init__(self, kind: type[nn.RNNBase], **options: bool | int):
        super().__init__()
        self.stem = nn.Conv1d(4, CHANNELS, 3, padding=1)
        self.rnn = kind(CHANNELS, CHANNELS, batch_first=True, **options)  # type: ignore[arg-type]
        self.mix = nn.Linear(CHANNELS * (2 if self.rnn.bidirectional else 1), CHANNELS)
        self.head = nn.Sequential(nn.Linear(CHANNELS, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).transpose(1, 2)
        return self.head(y + self.mix(self.rnn(y)[0]))


class Normed(nn.Module):
    """A small vocoder whose weights are recomputed by one of torch's normalisations."""

    def __init__(self, norm) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.first = norm(nn.Conv1d(4, 32, 5, padding=2))
        self.up = norm(nn.ConvTranspose1d(32, 24, 4, 2, 1))
        self.blocks = nn.ModuleList(norm(nn.Conv1d(24, 24, 3, padding=2**at, dilation=2**at)) for at in range(3))
        self.last = norm(nn.Conv1d(24, 1, 5, padding=2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(functional.leaky_relu(self.first(x), 0.1))
        for block in self.blocks:
            y = y + functional.leaky_relu(block(y), 0.1)
        return torch.tanh(self.last(y))


class SharedModule(nn.Module):
    """One module called three times, behind a stem that is called once; a tied decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Linear(12, 32), nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for _ in range(3):
            y = y + self.block(self.norm(y))
        return functional.linear(y, self.stem.weight.t())


class TwoTowers(nn.Module):
    """Two inputs, two towers, a dictionary of nested outputs; only one tower is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(16, 32, 3, 2, 1))
        self.right = nn.Sequential(nn.Linear(10, 48), nn.Tanh(), nn.Linear(48, 32))
        self.join = nn.Bilinear(32, 32, 8)

    def forward(self, image: Tensor, vector: Tensor) -> dict[str, object]:
        seen, known = self.left(image).mean((2, 3)), self.right(vector)
        return {"score": self.join(seen, known), "parts": {"image": functional.normalize(seen), "vector": (known,)}}


class InPlace(nn.Module):
    """In-place operators right at the cut, on a slice of it, and on a value that both paths read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y.relu_().mul_(0.5)
        z = self.second(y)
        z += y
        z[:, :4] = z[:, :4].sigmoid()
        z[:, 8:].clamp_(min=-1)
        return self.head(z).sub_(1)


class Autocast(nn.Module):
    """A region in bfloat16, one without gradients, and one with autocast switched off inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.gate = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        with torch.no_grad():
            gate = self.gate(y).sigmoid()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = functional.silu(self.inner(y))
            with torch.autocast("cpu", enabled=False):
                y = self.norm(y.float())
        return self.head(y * gate)


class PixelShuffle(nn.Module):
    """Space to depth and back, unfold and fold, around a concatenation into a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(12, 16, 3, padding=1)
        self.left, self.right = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.patches, self.out = nn.Conv2d(32 * 4, 16, 1), nn.Conv2d(16, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(functional.pixel_unshuffle(x, 2))
        y = self.grouped(torch.cat([self.left(y), self.right(y)], 1)).relu()
        batch, channels, height, width = y.shape
        windows = functional.unfold(y, 2, stride=2).view(batch, channels * 4, height // 2, width // 2)
        return functional.pixel_shuffle(functional.interpolate(self.out(self.patches(windows)), scale_factor=2.0), 2)


class Mixer(nn.Module):
    """Linear layers over the time axis and the channel axis in turn, a complex filter, and a softmax over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.time, self.channel = nn.Linear(6, 32), nn.Linear(20, 20), nn.Linear(32, 32)
        self.filter = nn.Parameter(torch.randn(11, 32, 2) * 0.1)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y + self.time(y.transpose(1, 2)).transpose(1, 2)
        spectrum = torch.fft.rfft(y, dim=1, norm="ortho") * torch.view_as_complex(self.filter)
        y = y + torch.fft.irfft(spectrum, n=20, dim=1, norm="ortho")
        return self.head((self.channel(y).softmax(-1) * y).relu())


def networks() -> list[Network]:
    sequence = noise(4, 20)
    recurrent = {
        "lstm": (nn.LSTM, {}),
        "lstm_two_layers": (nn.LSTM, {"num_layers": 2}),
        "gru": (nn.GRU, {}),
        "lstm_bidirectional": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
        "gru_bidirectional": (nn.GRU, {"bidirectional": True}),
        "rnn": (nn.RNN, {"num_layers": 2}),
    }
    norms = {
        "weight_norm": weight_norm,
        "weight_norm_parametrized": parametrizations.weight_norm,
        "spectral_norm": spectral_norm,
        "spectral_norm_parametrized": parametrizations.spectral_norm,
    }
    own: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
        "shared_module": (SharedModule, (7, 12)),
        "in_place": (InPlace, (3, 8, 8)),
        "autocast": (Autocast, (5, 16)),
        "pixel_shuffle": (PixelShuffle, (3, 16, 16)),
        "mixer": (Mixer, (20, 6)),
    }
    return [
        *(_from_tests(name) for name in ZOO),
        *(
            Network(f"own_{name}", "awkward", lambda kind=kind, options=options: Recurrent(kind, **options), sequence)  # type: ignore[misc]
            for name, (kind, options) in recurrent.items()
        ),
        *(Network(f"own_{name}", "awkward", lambda norm=norm: Normed(norm), sequence) for name, norm in norms.items()),  # type: ignore[misc]
        *(Network(f"own_{name}", "awkward", make, noise(*shape)) for name, (make, shape) in own.items()),
        Network(
            "own_two_towers",
            "awkward",
            TwoTowers,
            lambda batch: (torch.randn(batch, 3, 16, 16), torch.randn(batch, 10)),
        ),
    ]


def _from_tests(name: str) -> Network:
    given = ZOO[name]
    at = (given.at.removeprefix(f"{given.scope}."),)
    return Network(
        f"tests_{name}", "awkward", given.make, lambda batch: (given.batch(batch),), scope=given.scope, at=at
    )
