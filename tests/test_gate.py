"""Gates: what they learn, the mask in front of them, and the answer for what they stop."""

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import dslify
from dslify.data import open_data
from dslify.errors import DataError, OptionError, TrainError
from dslify.gate import GatedMaskObjective, GateObjective, fill_answers
from dslify.gather import gather
from dslify.mask import Mask
from dslify.samples import Samples
from dslify.switch import DSLayer, Layout, Switch, dsl_layers, route

LENGTH = 256
RARE = 0.04


class Tones(nn.Module):
    """Sound (batch, 1, LENGTH) -> logits (batch, 3)."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(1, 8, 9, 4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv1d(8, 12, 5, 2), nn.ReLU())
        self.out = nn.Linear(12, 3)
        self.example_input_array = torch.zeros(1, 1, LENGTH)

    def forward(self, sound: Tensor) -> Tensor:
        return self.out(self.second(self.first(sound)).mean(2))


def tones(count: int, seed: int = 0, share: float = 0.5) -> tuple[Samples, Tensor]:
    """Noise with a high tone in it (positive) or a low one, at any level."""
    random = torch.Generator().manual_seed(seed)
    positive = torch.rand(count, generator=random) < share
    positive[:2] = torch.tensor([True, False])
    pitch = torch.where(positive, 0.25, 0.06) * (1 + 0.2 * torch.rand(count, generator=random))
    phase = 2 * torch.pi * (pitch[:, None] * torch.arange(LENGTH) + torch.rand(count, 1, generator=random))
    level = 0.1 + torch.rand(count, 1, generator=random)
    sound = level * (phase.sin() + 0.3 * torch.randn(count, LENGTH, generator=random))
    labels = ["high" if one else "low" for one in positive]
    return open_data(sound[:, None], (1, LENGTH), labels=labels, progress=False), positive


def batches(samples: Samples, text: str) -> Iterator[tuple[int, Tensor]]:
    for begin in range(0, len(samples), 7):
        yield begin, samples.batch(range(begin, min(begin + 7, len(samples))))


def gated(at: str = "first", mask: str = "channel") -> nn.Module:
    torch.manual_seed(0)
    return dslify.insert(Tones().eval(), at, light="exit", mode="gc", mask=mask)


def only(net: nn.Module) -> DSLayer:
    (layer,) = dsl_layers(net)
    return layer


def features(net: nn.Module, samples: Samples) -> Tensor:
    layer = only(net)
    with torch.no_grad(), route(net, "full"):
        net(samples.batch(range(len(samples))))
        assert layer.paths is not None
        return layer.switch.features(layer.pooled(layer.paths.masked))


def ranked(score: Tensor, positive: Tensor) -> float:
    """Probability that a positive scores above a negative: area under the curve."""
    above = score[positive][:, None] > score[~positive]
    return above.float().mean().item()


def fit(objective: nn.Module, count: int, steps: int = 150, rate: float = 0.02) -> float:
    optimizer = torch.optim.AdamW(objective.parameters(), rate)
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss = objective(torch.randint(0, count, (64,), generator=random))
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    return loss.item()


@pytest.fixture(scope="module")
def known() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and Omega(y) to learn from, and others to judge by."""
    net = gated()
    (learn, learned), (judge, judged) = tones(300), tones(200, seed=1)
    return features(net, learn), learned, features(net, judge), judged


def trained_gate(seen: Tensor, positive: Tensor) -> Switch:
    torch.manual_seed(0)
    gate = Switch(seen.shape[1] // Switch.MOMENTS, kind="positive")
    gate.standardise(seen)
    fit(GateObjective([gate], [seen], positive), len(seen))
    return gate


def test_a_gate_learns_to_tell_positives(known):
    seen, positive, others, truth = known
    score = trained_gate(seen, positive).score(others).detach()
    assert ranked(score, truth) > 0.98
    assert ((score > 0.5) == truth).float().mean() > 0.95


def test_a_gate_learns_nothing_from_labels_dealt_at_random(known):
    seen, positive, others, truth = known
    dealt = torch.zeros_like(positive)
    for kind in (positive, ~positive):  # half of each, so that chance does not favour one
        dealt[kind.nonzero().squeeze(1)[::2]] = True
    score = trained_gate(seen, dealt).score(others).detach()
    assert nn.functional.binary_cross_entropy(score, truth.float()) > 0.6
    learned = trained_gate(seen, positive).score(others).detach()
    assert nn.functional.binary_cross_entropy(learned, truth.float()) < 0.2


def test_rare_positives_weigh_as_much_as_all_others(known):
    seen, positive, _, _ = known
    keep = torch.cat([positive.nonzero()[: int(RARE * len(positive))], (~positive).nonzero()]).squeeze(1)
    blind = torch.zeros_like(seen[keep])  # nothing to go by: the best answer is the positives' share of the weight
    score = trained_gate(blind, positive[keep]).score(blind)
    assert score[0].item() == pytest.approx(0.5, abs=0.12)
    assert positive[keep].float().mean() < 0.1


def test_the_gates_of_a_network_are_summed_and_each_gets_a_gradient(known):
    seen, positive, _, _ = known
    pair = [Switch(8, kind="positive") for _ in range(2)]
    at = torch.arange(20)
    both = GateObjective(pair, [seen, 2 * seen], positive)(at)
    assert both.shape == (1,)
    alone = sum(GateObjective([gate], [x], positive)(at) for gate, x in zip(pair, (seen, 2 * seen), strict=True))
    torch.testing.assert_close(both, alone)
    both.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for gate in pair for parameter in gate.parameters())


def test_a_gate_needs_both_kinds(known):
    seen, _, _, _ = known
    for one_kind in (torch.ones, torch.zeros):
        with pytest.raises(TrainError, match="samples of both kinds"):
            GateObjective([Switch(8, kind="positive")], [seen], one_kind(len(seen), dtype=torch.bool))


def test_the_answer_is_the_mean_of_the_full_paths_answers_to_negatives():
    net = gated()
    samples, positive = tones(50)
    net.eval()
    with torch.no_grad(), route(net, "full"):
        expected = net(samples.batch((~positive).nonzero().squeeze(1))).mean(0)
    assert fill_answers(net, dsl_layers(net), batches, samples, ~positive) == 1
    with torch.no_grad(), route(net, "light"):
        found = net(samples.batch([3, 4]))
    torch.testing.assert_close(found, expected.expand(2, 3))
    with torch.no_grad(), route(net, "full"):
        everything = net(samples.batch(range(50))).mean(0)
    assert (expected - everything).abs().max() > 1e-3  # so that it matters which samples are taken


def test_answers_of_every_type_and_layout():
    class Full(nn.Module):
        """Window-wise outputs on a later axis, whole numbers, a truth, and a value that all samples share."""

        def forward(self, x):
            windows = x.reshape(-1, 2).T.contiguous()  # (2, 2 * batch): two entries a sample on axis 1
            return windows, (10 * x[:, 0]).long(), x[:, 0] > 0.5, x.new_ones(3)

    class Constants(nn.Module):
        def __init__(self):
            super().__init__()
            self.answer0 = nn.Parameter(torch.zeros(2, 2))
            self.register_buffer("answer1", torch.zeros((), dtype=torch.long))
            self.register_buffer("answer2", torch.zeros((), dtype=torch.bool))
            self.register_buffer("answer3", torch.zeros(3))

        def forward(self, x):
            return self.answer0.T, self.answer1, self.answer2, self.answer3

    layouts = [Layout(1, per_sample=2), Layout(0), Layout(0), Layout(None)]
    layer = DSLayer(
        Mask((1, 4)), Switch(4, kind="positive"), Constants(), Full(), [Layout(0)], layouts, 1,
    )  # fmt: skip
    net = nn.Sequential(layer)
    x = torch.tensor([[0.3, 1.0, 2.0, 3.0], [0.1, 5.0, 6.0, 7.0], [-9.0, 0.0, 0.0, 0.0], [0.7, 0.0, 1.0, 0.0]])
    samples = open_data(x, (4,), progress=False)
    negative = torch.tensor([True, True, False, True])
    assert fill_answers(net, [layer], batches, samples, negative) == 1
    light = layer.light
    # sample n holds columns 2n and 2n + 1 of the output; an answer keeps its two entries first
    torch.testing.assert_close(light.answer0.data, torch.tensor([[1.1 / 3, 2.0], [3.0, 10 / 3]]))
    assert light.answer1.item() == 4  # mean of 3, 1 and 7, rounded
    assert light.answer2.item() is False  # one of three
    assert light.answer3.tolist() == [0, 0, 0]


def test_given_answers_and_their_refusals():
    net = gated()
    samples, positive = tones(20)
    layers = dsl_layers(net)
    fill_answers(net, layers, batches, samples, ~positive, given=[[0.0, 9.0, 0.5]])
    with torch.no_grad(), route(net, "light"):
        assert net(samples.batch([0])).tolist() == [[0.0, 9.0, 0.5]]
    for given, says in [
        ([], "0 answers for negatives were given and the region has 1 outputs"),
        ([[1.0, 2.0]], "has the shape 2; expected 3"),
        ([[1.0, 2.0, float("nan")]], "holds NaN"),
        ([["a", "b", "c"]], "is no array of numbers"),
    ]:
        with pytest.raises(OptionError, match=re.escape(says)):
            fill_answers(net, layers, batches, samples, ~positive, given=given)
    with pytest.raises(DataError, match="none of 20 is negative"):
        fill_answers(net, layers, batches, samples, torch.zeros(20, dtype=torch.bool))


def test_other_light_paths_keep_what_they_are():
    net = dslify.insert(Tones().eval(), "first", 0.5)
    samples, positive = tones(10)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert fill_answers(net, dsl_layers(net), batches, samples, ~positive) == 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def mask_objective(net: nn.Module, samples: Samples, positive: Tensor, room: int) -> GatedMaskObjective:
    layers = dsl_layers(net)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    scales, tables = gather(net, layers, batches, samples, room, True)
    assert (tables is None) == (room == 0)
    for layer, scale in zip(layers, scales, strict=True):
        layer.scale.copy_(scale)
        for parameter in (layer.mask.weight, *layer.switch.parameters()):
            parameter.requires_grad_(True)
    return GatedMaskObjective(net, layers, tables, samples, positive)


@pytest.mark.parametrize("room", [0, 1 << 24])
def test_the_masks_objective_with_and_without_a_table(room):
    net = gated()
    samples, positive = tones(30)
    objective = mask_objective(net, samples, positive, room)
    layer = only(net)
    with torch.no_grad():
        layer.mask.weight.mul_(torch.linspace(0.1, 1.0, 8).reshape_as(layer.mask.weight))
    at = torch.tensor([3, 1, 7, 20])
    with route(net, "both"):
        found = objective(at)
    found[0].backward(retain_graph=True)
    assert layer.mask.weight.grad.abs().sum() > 0  # the gate's loss reaches the mask
    assert all(parameter.grad is not None for parameter in layer.switch.parameters())
    x = samples.batch(at)
    with torch.no_grad(), route(net, "full"):
        masked = net(x)
        score = layer.paths.score
        size = layer.mask.weight.abs().sum()
        layer.mask.weight.fill_(1.0)
        plain = net(x)
    weight = torch.where(positive, 15 / positive.sum(), 15 / (~positive).sum())[at]
    gate = nn.functional.binary_cross_entropy(score, positive[at].float(), weight)
    anchor = (masked - plain).abs().mean() / layer.scale[0]
    torch.testing.assert_close(found.detach(), torch.stack([gate, size, anchor]), rtol=1e-5, atol=1e-6)


def test_more_beta_gives_more_zeros_and_the_gate_still_tells():
    samples, _ = tones(150)
    others, truth = tones(200, seed=1)
    sparse, told = [], []
    for beta in (0.0, 0.2, 5.0):
        net = gated()
        dslify.finetune(
            net, samples, switch_data=samples, positive="high", steps=150 if beta else 0, switch_steps=100, lr=0.04,
            beta=beta, progress=False,
        )  # fmt: skip
        layer = only(net)
        sparse.append(layer.mask.sparsity())
        told.append(ranked(layer.switch.score(features(net, others)).detach(), truth))
    assert sparse[0] == 0.0
    assert 0.0 < sparse[1] < sparse[2]
    assert min(told[:2]) > 0.95


def test_two_gates_in_one_network():
    net = dslify.insert(gated("first"), "second", light="exit", mode="gc", example_inputs=(torch.zeros(1, 1, LENGTH),))
    samples, positive = tones(100)
    layers = dsl_layers(net)
    history = dslify.finetune(
        net, samples, switch_data=samples, positive={"high"}, steps=0, switch_steps=120, lr=0.02, progress=False
    )
    assert [phase.name for phase in history.phases] == ["switch"]
    x = samples.batch(range(100))
    with torch.no_grad(), route(net, "full"):
        expected = net(x)[~positive].mean(0)
        scores = [layer.paths.score for layer in layers]
    for layer, score in zip(layers, scores, strict=True):
        assert ranked(score, positive) > 0.98
        layer.threshold.fill_(0.5)
    ran = []
    layers[1].register_forward_hook(lambda *_: ran.append(layers[1].paths.score.shape[0]))
    with torch.no_grad(), route(net, "mixed"):
        found = net(x)
    first, second = layers[0].paths.light_taken, layers[1].paths.light_taken
    assert ran == [100 - int(first.sum())]  # what the first gate stops, the second never sees
    stopped = first.clone()
    stopped[~first] = second
    assert (stopped == ~positive).float().mean() > 0.95
    torch.testing.assert_close(found[stopped], expected.expand(int(stopped.sum()), 3))


def test_an_answer_whose_length_varies_is_the_mean_over_time_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 8, 9, 4), nn.ReLU(), nn.Conv1d(8, 12, 5, 2)).eval()
    net = dslify.insert(model, "1", light="exit", mode="gc", example_inputs=(torch.randn(2, 1, LENGTH),))
    samples, positive = tones(20)
    assert fill_answers(net, dsl_layers(net), batches, samples, ~positive) == 1
    with torch.no_grad():
        full = model(samples.batch((~positive).nonzero().flatten().tolist()))
    answer = only(net).light.answer0
    assert answer.shape == (12, 1)
    torch.testing.assert_close(answer, full.mean((0, 2))[:, None])
    with torch.no_grad(), route(net, "light"):
        assert net(torch.randn(1, 1, 2 * LENGTH)).shape == model(torch.randn(1, 1, 2 * LENGTH)).shape
