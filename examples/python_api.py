"""The whole path in Python, on a network and sound made here: cut, fine-tune, calibrate, evaluate, save, undo.

Run: python examples/python_api.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import dslify


def network() -> nn.Module:
    """A small convolutional network that nobody prepared for dslify."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(1, 16, 16, stride=8), nn.ELU(), nn.Conv1d(16, 64, 5, stride=4), nn.ELU(),
        nn.Conv1d(64, 64, 5), nn.ELU(), nn.Conv1d(64, 8, 3),
    )  # fmt: skip


def sound(clips: int, seed: int) -> torch.Tensor:
    """(clips, 1, 4000): half of them near silence, half of them tones."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(4000) / 16000
    pitch = 100 + 900 * torch.rand(clips, 1, 1, generator=generator)
    loud = torch.where(torch.arange(clips) % 2 == 0, 0.01, 0.3).view(-1, 1, 1)
    return loud * (torch.sin(2 * torch.pi * pitch * time) + 0.1 * torch.randn(clips, 1, 4000, generator=generator))


def main(folder: Path) -> None:
    model = network()
    for point in dslify.cut_points(model, (sound(1, 0),)):
        print(point.path, point.shape, point.region_macs, point.reason)

    net = dslify.insert(model, at="1", width=0.1, example_inputs=(sound(1, 0),))
    for row in dslify.cost(net):
        print(f"{row.name:>6}: {row.params} parameters, {row.macs} MACs")

    dslify.finetune(net, sound(128, 1), switch_data=sound(64, 2), steps=200, switch_steps=200, progress=False)
    found = dslify.calibrate(net, sound(64, 3), light_share=0.5)
    print(f"threshold {found.threshold:.4f}: {found.how}")
    dslify.evaluate(net, sound(64, 4))

    file = dslify.save(net, folder / "network.dsl")
    again = dslify.load(file)
    test = sound(8, 5)
    with torch.no_grad():
        print("reloaded, the same answers:", torch.equal(again(test), net(test)))
        print("light path taken:", dslify.dsl_layers(again)[0].paths.light_taken.tolist())
        print("undone, the network as it was:", torch.equal(dslify.remove(net)(test), model(test)))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
