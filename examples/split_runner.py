"""A network for two processors: written in parts, run as a stream, with the big one woken only where it is needed.

Run: python examples/split_runner.py (needs pip install 'dslify[onnx]')
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import dslify
from dslify.runtime import Runner


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 16, 16, stride=8), nn.ReLU(), nn.Conv1d(16, 32, 5, stride=4), nn.ReLU(),
                         nn.Conv1d(32, 8, 3))  # fmt: skip


def segments() -> torch.Tensor:
    """(12, 1, 2000): silence, then sound, then silence."""
    loud = torch.tensor([0.01] * 4 + [1.0] * 4 + [0.01] * 4).view(-1, 1, 1)
    return loud * torch.randn(12, 1, 2000, generator=torch.Generator().manual_seed(0))


def main(folder: Path) -> None:
    sound = segments()
    net = dslify.insert(network(), at="1", width=0.25, example_inputs=(sound[:1],))
    (layer,) = dslify.dsl_layers(net)
    with torch.no_grad():  # in place of training: half of the channels are masked, and the threshold lies between
        layer.mask.weight[:, ::2] = 0
        layer.switch.out.weight.neg_()  # quiet segments score low
        net(sound)
        layer.threshold.fill_(layer.paths.score.mean())
        eager = net(sound).numpy()

    written = dslify.export(net, folder / "parts", split=True)
    for file in written.files:  # front and light go to the small processor, full to the big one
        print(f"{file.name}: {file.stat().st_size} bytes")

    runner = Runner(
        folder / "parts", on_wake=lambda: print("  the big processor wakes"), on_sleep=lambda: print("  and sleeps")
    )
    answers = []
    for at, result in enumerate(runner.stream(np.split(sound.numpy(), len(sound)))):
        print(f"segment {at}: {result.route}, {result.bytes_sent} bytes sent, {result.bytes_dense} dense")
        answers.append(result.outputs[0])
    found = runner.statistics
    print(f"{100 * found.light_share:.0f} % light, {found.wakes} wake, {found.bytes_sent} bytes sent;")
    print(f"dense they are {found.bytes_dense}, and {found.bytes_always} when every segment is sent")
    print("the same answers:", np.allclose(np.concatenate(answers), eager, atol=2e-3 * np.abs(eager).max()))
    print("undone, the network as it was:", torch.equal(dslify.remove(net)(sound), network()(sound)))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
