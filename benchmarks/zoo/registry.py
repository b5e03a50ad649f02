"""All networks of the zoo, by name and group."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fnmatch import fnmatch

from . import awkward, hugging_face, timm_networks, torch_networks
from .network import Network


def networks() -> list[Network]:
    """The quick ones first."""
    return [
        *awkward.networks(),
        *torch_networks.torchaudio_networks(),
        *hugging_face.networks(),
        *torch_networks.torchvision_networks(),
        *timm_networks.networks(),
    ]


def selected(patterns: Sequence[str]) -> list[Network]:
    """Networks whose name or group matches one of the patterns."""
    return [
        network
        for network in networks()
        if any(fnmatch(network.name, pattern) or network.group == pattern for pattern in patterns)
    ]


def drawn(networks: list[Network], count: int | None) -> list[Network]:
    """`count` of them at random, the same ones every time; all of them for None."""
    return networks if count is None or count >= len(networks) else random.Random(0).sample(networks, max(1, count))
