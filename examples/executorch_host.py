"""An ExecuTorch file and the loop of its host: front for every input, then light or full.

Run: python examples/executorch_host.py (needs pip install 'dslify[executorch]')
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import dslify
from dslify.errors import ExportError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 16, 16, stride=8), nn.ELU(), nn.Conv1d(16, 32, 5, stride=4), nn.ELU(),
                         nn.Conv1d(32, 8, 3))  # fmt: skip


def segments() -> torch.Tensor:
    """(8, 1, 2000): silence and sound in turn."""
    loud = torch.tensor([0.01, 1.0] * 4).view(-1, 1, 1)
    return loud * torch.randn(8, 1, 2000, generator=torch.Generator().manual_seed(0))


def main(folder: Path) -> None:
    sound = segments()
    net = dslify.insert(network(), at="1", width=0.25, example_inputs=(sound[:1],))
    (layer,) = dslify.dsl_layers(net)
    with torch.no_grad():  # in place of training: the threshold lies between silence and sound
        net(sound)
        layer.threshold.fill_(layer.paths.score.mean())
        eager = net(sound)
    try:
        written = dslify.export(net, folder / "network.pte")
    except ExportError as error:
        print(error)
        return
    print(*written.notes, sep="\n")

    from executorch.runtime import Runtime

    program = Runtime.get().load_program(folder / "network.pte")
    front, light, full = (program.load_method(name) for name in ("front", "light", "full"))
    (threshold,) = program.load_method("threshold").execute([])
    answers = []
    for segment in sound.split(1):
        masked, score, *passed = front.execute([segment])
        path = light if score.item() < threshold else full
        print("light" if path is light else "full")
        answers.append(path.execute([masked, *passed])[0].clone())  # the next call overwrites it
    print("the same answers:", torch.allclose(torch.cat(answers), eager, atol=1e-4 * eager.abs().max().item()))
    print("undone, the network as it was:", torch.equal(dslify.remove(net)(sound), network()(sound)))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
