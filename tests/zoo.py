"""Networks that the invariants run over: public ones with random weights, and small ones, each awkward in its way."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Network:
    """make: builds it (random weights). shape: of one input, batch first. at, scope: as in insert()."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    at: str
    scope: str | None = None

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval()

    def batch(self, size: int, seed: int = 1) -> Tensor:
        return torch.randn(size, *self.shape[1:], generator=torch.Generator().manual_seed(seed))


def autoencoder() -> nn.Module:
    def down(i: int, o: int) -> nn.Module:
        return nn.Sequential(nn.Conv1d(i, o, 4, 2, 1), nn.BatchNorm1d(o), nn.ReLU(inplace=True))

    def up(i: int, o: int) -> nn.Module:
        return nn.Sequential(nn.ConvTranspose1d(i, o, 4, 2, 1), nn.ReLU(inplace=True))

    encoder = OrderedDict(block1=down(1, 16), block2=down(16, 32), block3=down(32, 48), block4=down(48, 64))
    decoder = OrderedDict(
        block1=up(64, 48), block2=up(48, 32), block3=up(32, 16), block4=nn.ConvTranspose1d(16, 1, 4, 2, 1)
    )
    return nn.Sequential(OrderedDict(encoder=nn.Sequential(encoder), decoder=nn.Sequential(decoder)))


class UNet(nn.Module):
    """Skips across the cut; concatenation into a grouped convolution; a dictionary as output."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.middle = nn.Conv2d(32, 32, 3, 1, 1)
        self.up1 = nn.ConvTranspose2d(32, 16, 4, 2, 1)
        self.mix = nn.Conv2d(32, 32, 3, 1, 1, groups=2)
        self.norm = nn.GroupNorm(4, 32)
        self.head = nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        one = functional.silu(self.down1(x))
        two = functional.silu(self.down2(one))
        up = functional.silu(self.up1(self.middle(two)))
        mixed = self.norm(self.mix(torch.cat([one, up], 1)))
        return {"mask": self.head(mixed), "level": mixed.square().mean((2, 3))}


class Shuffle(nn.Module):
    """Channel shuffle, depthwise convolution, split and slice, in-place operators right behind the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 24, 5, 2, 2)
        self.depthwise = nn.Conv1d(24, 24, 3, 1, 1, groups=24)
        self.point = nn.Conv1d(24, 32, 1)
        self.left, self.right = nn.Conv1d(16, 18, 3, 1, 1), nn.Conv1d(16, 18, 3, 1, 1)
        self.out = nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(functional.relu_(self.stem(x)))
        y = functional.relu_(self.point(y))
        left, right = y.chunk(2, 1)
        both = torch.cat([self.left(left), self.right(right)], 1)
        batch, channels, time = both.shape
        both = both.view(batch, 6, channels // 6, time).transpose(1, 2).reshape(batch, channels, time)
        gate = both[:, 18:].sigmoid()
        both = torch.cat([both[:, :18] * gate, gate], 1)
        return self.out(both.mean(2))


class Tied(nn.Module):
    """Embedding and output share a weight; attention in einsum spelling; a second tower that does not see the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.first = nn.Linear(32, 32)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.tower = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed((x.abs() * 10).long().clamp(max=49))
        h = self.first(tokens)
        batch, length, width = h.shape
        q, k, v = self.qkv(self.norm(h)).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (torch.einsum("bhld,bhsd->bhls", q, k) / 8**0.5).softmax(-1)
        mixed = torch.einsum("bhls,bhsd->bhld", weights, v).transpose(1, 2).flatten(2)
        h = h + self.proj(mixed) + self.tower(tokens)
        return functional.linear(self.norm(h), self.embed.weight)


def resnet18() -> nn.Module:
    import timm

    return timm.create_model("resnet18")


def vit(depth: int = 4) -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", depth=depth)


def wav2vec2(layers: int = 3) -> nn.Module:
    from torchaudio.models import wav2vec2_model

    return wav2vec2_model(
        extractor_mode="layer_norm", extractor_conv_layer_config=[(32, 10, 5), (32, 3, 4), (32, 2, 4)],
        extractor_conv_bias=False, encoder_embed_dim=64, encoder_projection_dropout=0.0, encoder_pos_conv_kernel=16,
        encoder_pos_conv_groups=4, encoder_num_layers=layers, encoder_num_heads=4, encoder_attention_dropout=0.0,
        encoder_ff_interm_features=128, encoder_ff_interm_dropout=0.0, encoder_dropout=0.0,
        encoder_layer_norm_first=False, encoder_layer_drop=0.0, aux_num_out=None,
    )  # fmt: skip


def codec() -> nn.Module:
    from recipes.soundstream.model import pretrained

    return pretrained()


def codec_cut() -> str:
    from recipes.soundstream.model import CUT

    return CUT


ZOO = {
    "autoencoder": Network(autoencoder, (1, 1, 4096), "encoder.block3"),
    "unet": Network(UNet, (1, 3, 32, 32), "down2"),
    "shuffle": Network(Shuffle, (1, 2, 128), "stem"),
    "tied": Network(Tied, (1, 12), "first"),
    "resnet18": Network(resnet18, (1, 3, 64, 64), "layer2"),
    "vit": Network(vit, (1, 3, 224, 224), "blocks.1"),
    "wav2vec2": Network(wav2vec2, (1, 4000), "encoder.transformer.layers.0"),
    "codec": Network(codec, (1, 1, 16000), codec_cut(), scope="encoder"),
}
