"""How far a graph sees: formulas for chains of convolutions and poolings, gradients for the rest, and real networks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional

import dslify
from dslify.errors import OptionError
from dslify.layout import Stretch
from dslify.receptive import receptive_field
from recipes.soundstream.model import SoundStream
from tests.zoo import wav2vec2

CUT = (Stretch(2, 1, 1),)  # the only input runs with itself


class Answering(nn.Module):
    """Answers with a tuple, as regions do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return (self.inner(x),)


def graph(*layers):
    torch.manual_seed(0)
    return fx.symbolic_trace(Answering(nn.Sequential(*layers)).eval())


def field(*layers, channels=2):
    return receptive_field(graph(*layers), (torch.zeros(1, channels, 64),), CUT)


links = st.one_of(
    st.tuples(
        st.just("conv"), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 4), st.integers(0, 4)
    ),
    st.tuples(
        st.sampled_from(["mean", "max"]), st.integers(1, 4), st.integers(1, 3), st.just(1), st.just(0), st.just(0)
    ),
    st.tuples(st.just("elu"), st.just(1), st.just(1), st.just(1), st.just(0), st.just(0)),
)


def link(kind, kernel, stride, dilation, left, right):
    match kind:
        case "conv":
            conv = nn.Conv1d(2, 2, kernel, stride, dilation=dilation)
            return nn.Sequential(nn.ConstantPad1d((left, right), 0.0), conv)
        case "mean":
            return nn.AvgPool1d(kernel, stride)
        case "max":
            return nn.MaxPool1d(kernel, stride)
    return nn.ELU()


@settings(max_examples=15, deadline=None)
@given(st.lists(links, min_size=1, max_size=4))
def test_chains_see_what_the_formula_says(chain):
    step, low, high = 1, 0, 0  # entry j of the answer reads the entries j * step + low ... j * step + high
    for _, kernel, stride, dilation, left, _ in chain:
        low, high = low - step * left, high + step * ((kernel - 1) * dilation - left)
        step *= stride
    found = field(*(link(*each) for each in chain))
    assert (found.step_in, found.step_out) == (step, 1)
    assert found.before == max(0, -low)
    assert found.after == max(0, high - (step - 1))


def seen_by_gradient(net, step, length=144):
    """(before, after) of a block in the middle, by what a gradient reaches; all weights positive."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.abs_().add_(0.1)
    x = torch.rand(1, 2, length, requires_grad=True)
    (out,) = net(x)
    per = out.shape[2] // (length // step)
    at = length // step // 2
    out[:, :, at * per : (at + 1) * per].sum().backward()
    entries = x.grad.abs().sum((0, 1)).nonzero().flatten()
    return max(0, at * step - int(entries[0])), max(0, int(entries[-1]) - ((at + 1) * step - 1))


@pytest.mark.parametrize(
    ("layers", "step", "step_out"),
    [
        ([nn.ConvTranspose1d(2, 2, 4, 2, 1)], 1, 2),
        ([nn.ConvTranspose1d(2, 2, 9, 3, 3), nn.Conv1d(2, 2, 3, padding=1)], 1, 3),
        ([nn.Conv1d(2, 2, 4, 4), nn.ConvTranspose1d(2, 2, 4, 4), nn.Conv1d(2, 2, 3, padding=1)], 4, 4),
        ([nn.Upsample(scale_factor=2), nn.Conv1d(2, 2, 7, 3, 3)], 3, 2),
        ([nn.Conv1d(2, 2, 3, 3, 1), nn.Upsample(scale_factor=2), nn.Conv1d(2, 2, 5, padding=2)], 3, 2),
    ],
)
def test_what_resamples_sees_what_a_gradient_reaches(layers, step, step_out):
    net = graph(*layers)
    found = receptive_field(net, (torch.zeros(1, 2, 64),), CUT)
    assert (found.step_in, found.step_out) == (step, step_out)
    assert (found.before, found.after) == seen_by_gradient(net, step)


class Halves(nn.Module):
    def forward(self, x):
        quick = functional.interpolate(x[..., ::2], scale_factor=2.0)
        return torch.where(x > 0, functional.pad(x, (3, 0))[..., :-3], torch.zeros(())) + quick


def test_a_value_that_only_a_comparison_reads_is_seen_and_so_is_every_rate_on_the_way():
    found = field(Halves())
    assert (found.step_in, found.step_out) == (2, 2), "entries are taken in pairs, though as many leave as enter"
    assert (found.before, found.after) == (3, 0)
    late = field(nn.Sequential(_Compared()))
    assert (late.before, late.after) == (0, 7)


class _Compared(nn.Module):
    def forward(self, x):
        ahead = functional.pad(x, (0, 7))[..., 7:]
        return torch.where(ahead > 0, x, -x)


def test_two_fields_together_hold_both():
    one = field(nn.ConstantPad1d((5, 0), 0.0), nn.Conv1d(2, 2, 6))
    two = field(nn.Conv1d(2, 2, 3, 2, 1), nn.Upsample(scale_factor=2))
    both = one.joined(two)
    assert (one.before, one.after, one.step_in) == (5, 0, 1)
    assert (both.before, both.after, both.step_in, both.step_out) == (5, max(one.after, two.after), 2, 2)


def test_the_codecs_encoder_behind_its_cut():
    """By hand, in entries at the cut (200 Hz): block2's convolution 4/2, two of 3 at 100 Hz, block3's 4/2, one of 3 at
    50 Hz: (4 - 2) + 2 * 2 * 2 + 2 * (4 - 2) + 2 * 4 = 22."""
    encoder = SoundStream().encoder.eval()
    behind = [child for name, child in encoder.named_children() if name not in ("stem", "block1")]
    found = field(*behind, channels=32)
    assert (found.step_in, found.step_out, found.before, found.after) == (4, 1, 22, 0)


def test_wav2vec2_layer_by_layer():
    extractor = wav2vec2().feature_extractor
    convolutions = [layer.conv for layer in extractor.conv_layers]
    steps = [conv.stride[0] for conv in convolutions]
    reach = 1 + sum((conv.kernel_size[0] - 1) * math.prod(steps[:at]) for at, conv in enumerate(convolutions))
    layers = [nn.Sequential(layer.conv, layer.layer_norm, nn.GELU()) for layer in extractor.conv_layers]
    found = receptive_field(graph(*layers), (torch.randn(1, 1, 640),), CUT)
    step = math.prod(steps)
    assert (found.step_in, found.before, found.after) == (step, 0, max(0, reach - step))


class Attention(nn.Module):
    def forward(self, x):
        sequence = x.transpose(1, 2)
        return functional.scaled_dot_product_attention(sequence, sequence, sequence).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(2, 2, batch_first=True)

    def forward(self, x):
        return self.gru(x.transpose(1, 2))[0].transpose(1, 2)


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(2, keepdim=True)


class Backwards(nn.Module):
    def forward(self, x):
        return x.flip(2)


class Behind(nn.Module):
    """A network whose cut is behind its first convolution."""

    def __init__(self, region):
        super().__init__()
        self.stem, self.region = nn.Conv1d(1, 2, 3, padding=1), region

    def forward(self, x):
        return self.region(self.stem(x))


def test_a_recurrent_layer_is_named_by_module_and_operator():
    net = dslify.capture(Behind(nn.Sequential(Recurrent(), nn.Conv1d(2, 2, 1))), (torch.randn(1, 1, 64),)).module
    net.graph.set_codegen(fx.graph.CodeGen())
    net.recompile()
    words = r"The region looks at the whole sequence at region\.0\.gru \(aten\.gru\.input\): an answer"
    with pytest.raises(OptionError, match=words):
        receptive_field(net, (torch.randn(1, 1, 64),), CUT)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (Attention(), "scaled_dot_product_attention"),
        (Centred(), "mean"),
        (nn.GroupNorm(1, 2), "inner_1"),
        (nn.InstanceNorm1d(2), "inner_1"),
    ],
)
def test_what_looks_at_everything_is_named(layer, named):
    with pytest.raises(OptionError, match=rf"The region looks at the whole sequence at .*\({named}\)"):
        field(nn.Conv1d(2, 2, 3, padding=1), layer, nn.Conv1d(2, 2, 1))


def test_what_turns_time_around_is_refused():
    with pytest.raises(OptionError, match="The region reads the farther away the longer the sequence is"):
        field(nn.Conv1d(2, 2, 3, padding=1), Backwards())


def test_an_answer_without_time_is_refused():
    with pytest.raises(OptionError, match=r"Light looks at the whole sequence: its answer inner_1 has no axis"):
        receptive_field(graph(nn.AdaptiveAvgPool1d(1), nn.Flatten()), (torch.zeros(1, 2, 64),), CUT, "Light")


def test_a_long_reach_is_no_whole_sequence():
    layers = [nn.Conv1d(2, 2, 3, dilation=2**at, padding=2**at) for at in range(10)]
    found = field(*layers)
    assert (found.before, found.after) == (1023, 1023)
