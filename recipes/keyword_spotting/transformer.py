"""A small keyword transformer: two log-mel frames are a token, and four encoder layers look at all of them.

    sound (batch, 1, 16000), 16 kHz -> log-mel (batch, 40, 51) -> tokens (batch, 26, 48) -> 4 layers -> logits

After the Keyword Transformer (arXiv 2104.00769), with the norm before each part and the mean of the tokens in place of
a class token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .network import BANDS, HOP, LENGTH, LogMel

TOKENS = LENGTH // HOP // 2 + 1


class Layer(nn.Module):
    """Attention and two linear layers, each around a skip connection: (batch, tokens, width) -> the same."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.inner_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.inner = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, value: Tensor) -> Tensor:
        batch, tokens, width = value.shape
        qkv = self.qkv(self.attention_norm(value)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, content = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        found = F.scaled_dot_product_attention(query, key, content)
        value = value + self.out(found.transpose(1, 2).reshape(batch, tokens, width))
        return value + self.inner(self.inner_norm(value))


class KeywordTransformer(nn.Module):
    """Logits of one second of sound: (batch, 1, 16000) -> (batch, classes). Layer k of n ends at depth (k + 1) / n."""

    def __init__(self, classes: int, width: int = 48, layers: int = 4, heads: int = 4, inner: int = 96):
        super().__init__()
        self.front = LogMel()
        self.stem = nn.Conv1d(BANDS, width, 3, 2, padding=1)
        self.places = nn.Parameter(torch.randn(1, TOKENS, width) * 0.02)
        self.blocks = nn.Sequential(*(Layer(width, heads, inner) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, classes)
        self.example_input_array = torch.zeros(1, 1, LENGTH)

    def forward(self, sound: Tensor) -> Tensor:
        return self.answer(self.front(sound))

    def answer(self, frames: Tensor) -> Tensor:
        """Logits of log-mel frames, (batch, BANDS, 2 TOKENS - 1)."""
        return self.stages(frames)[0]

    def stages(self, frames: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The logits, and what every layer but the last gives, (batch, tokens, width) each."""
        values = [self.stem(frames).transpose(1, 2) + self.places]
        for block in self.blocks:
            values.append(block(values[-1]))
        return self.head(self.dropout(self.norm(values[-1]).mean(1))), values[1:-1]
