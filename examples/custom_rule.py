"""A custom operator in a network: without a row it keeps its channels and is named; with one they shrink.

Run: python examples/custom_rule.py
"""

import torch
from torch import nn

import dslify


@torch.library.custom_op("demo::scaled_softplus", mutates_args=())
def scaled_softplus(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:  # (n, c, t), one scale per channel c
    return torch.nn.functional.softplus(x * scale[:, None])


@scaled_softplus.register_fake
def _(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, scale = ctx.saved_tensors
    inner = grad * torch.sigmoid(x * scale[:, None])
    return inner * scale[:, None], (inner * x).sum((0, 2))


scaled_softplus.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.head = nn.Conv1d(1, 16, 8, 4), nn.Conv1d(16, 64, 5), nn.Conv1d(64, 8, 3)
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(scaled_softplus(self.wide(self.stem(x)), self.scale))


def cut(model: nn.Module, x: torch.Tensor) -> None:
    net = dslify.insert(model, at="stem", width=0.25, example_inputs=(x,))
    (layer,) = dslify.dsl_layers(net)
    print("no row:", list(layer.plan.ledger), "wide:", tuple(layer.light.get_parameter("wide.weight").shape))
    with torch.no_grad(), dslify.route(net, "full"):
        print("full route, the same answers:", torch.equal(net(x), model(x)))
        print("undone, the network as it was:", torch.equal(dslify.remove(net)(x), model(x)))


cut(network := Network().eval(), sound := torch.randn(1, 1, 400))


@dslify.rule("demo.scaled_softplus.default")  # n c t, c -> n c t
def scaled_softplus_row(b, node):
    x, scale = (b[operand] for operand in node.args)
    b.unify(node, x[1], scale[0])
    return x


cut(network, sound)
