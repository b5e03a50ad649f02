"""Numbers that a forward reads out of its inputs: fixed, said, checked at every call; refused where values decide."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dslify
from dslify.capture import capture
from dslify.errors import CaptureError
from dslify.readings import readings

CLOSE = 1e-6  # relative: same kernels, other batch


class Masks(nn.Module):
    """A sequence network whose padding mask is as long as the longest of the lengths it is told."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x, lengths):
        ends = lengths[:, None]
        longest = int(ends.max().item())
        x = self.first(x)
        padding = torch.arange(longest).expand(x.shape[0], longest) >= ends
        return self.last(self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0])


def example(batch, longest=6):
    return torch.randn(batch, longest, 4), torch.full((batch,), longest)


def test_a_mask_from_lengths_is_captured_with_its_length_fixed():
    model = Masks().eval()
    graph = capture(model, example(1))
    assert graph.dynamic.startswith("batch varies")
    assert "numbers that the forward reads from its inputs are fixed: 6 (test_readings.py:" in graph.dynamic
    x, lengths = example(3)
    lengths[1] = 2
    torch.testing.assert_close(graph.module(x, lengths), model(x, lengths), rtol=CLOSE, atol=CLOSE)
    with pytest.raises(RuntimeError, match=r"captured for inputs where test_readings.py:\d+ reads 6"):
        graph.module(x, lengths.clamp_max(5))


def test_it_can_be_cut_saved_and_still_refuses_other_lengths(tmp_path):
    model = Masks().eval()
    net = dslify.insert(model, "first", 0.5, example(1))
    (layer,) = dslify.dsl_layers(net)
    assert len(layer.outputs) == 1, "what is checked is no output of the paths"
    net = dslify.load(dslify.save(net, tmp_path / "net.dsl"))
    x, lengths = example(3)
    with dslify.route(net, "full"):
        torch.testing.assert_close(net(x, lengths), model(x, lengths), rtol=CLOSE, atol=CLOSE)
        with pytest.raises(RuntimeError, match="reads another"):
            net(x, lengths - 1)


class Counts(nn.Module):
    def forward(self, x):
        return F.pad(x, (0, int((x > 0).sum())))


def test_what_real_numbers_decide_is_no_reading():
    x = torch.linspace(-1, 1, 6)[None]
    assert readings(Counts(), (x,), {}) == ()
    with pytest.raises(CaptureError, match=r"at .*test_readings.py:\d+"):
        capture(Counts(), (x,))


def test_tensors_are_read_as_ever_afterwards():
    methods = [vars(Tensor).get(name) for name in ("item", "__int__", "__index__")]
    capture(Masks(), example(1))
    with pytest.raises(RuntimeError):
        readings(Masks(), (torch.randn(1, 6, 5), torch.tensor([6])), {})
    assert [vars(Tensor).get(name) for name in ("item", "__int__", "__index__")] == methods
    assert torch.tensor(3).item() == 3
