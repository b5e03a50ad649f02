"""Routing by segments: at every border the answer is that of the path on the whole sequence."""

import json
import zipfile
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import dslify
from dslify.cli import app
from dslify.errors import OptionError, StoreError, VerifyError
from dslify.functional import copied
from dslify.segments import by_segment
from tests.sequences import SEQUENCES, inserted

EXACT = 1e-5  # of the largest value


@pytest.fixture(params=SEQUENCES)
def routed(request):
    """(network that routes by segments, what it is)"""
    one = SEQUENCES[request.param]
    net = copied(inserted(request.param))
    dslify.route_every(net, one.entries)
    return net, one


def layer_of(net):
    (layer,) = dslify.dsl_layers(net)
    return layer


def answers(net, x, mode):
    """The values that leave the layer, a tuple."""
    seen = []
    handle = layer_of(net).register_forward_hook(lambda _, given, out: seen.append(out))
    with torch.no_grad(), dslify.route(net, mode):
        net(x)
    handle.remove()
    return seen[0] if isinstance(seen[0], tuple) else (seen[0],)


def split_in_half(net, x):
    """Set the threshold so that half of the segments go light; returns which do, (batch, segments)."""
    layer = layer_of(net)
    answers(net, x, "mixed")
    scores = layer.paths.score
    layer.threshold.copy_(scores.sort().values[len(scores) // 2 - 1 : len(scores) // 2 + 1].mean())
    return (scores < layer.threshold).view(len(x), layer.paths.segments)


def errors(net, x, light):
    """By output the largest error over the largest value, against each segment's own path on the whole sequence."""
    segments = layer_of(net).segments
    runs = [answers(net, x, mode) for mode in ("mixed", "full", "light")]
    found = []
    for mixed, full, cheap, out in zip(*runs, segments.outputs, strict=True):
        mixed, full, cheap = (value.movedim(out.axis, 1) for value in (mixed, full, cheap))
        assert mixed.shape == full.shape
        at = (torch.arange(mixed.shape[1]) // out.at(segments.frames)).clamp(max=light.shape[1] - 1)
        goes = light[:, at].view(*mixed.shape[:2], 1)
        wanted = torch.where(goes, cheap, full)
        assert (full - cheap).abs().max() > 0.01 * full.abs().max(), "the paths have to differ"
        found.append(float((mixed - wanted).abs().max() / wanted.abs().max()))
    return found


def worst(net, x, light):
    try:
        return max(errors(net, x, light))
    except RuntimeError:  # a window without padding whose answer has too few entries for its segment
        return float("inf")


def test_every_border_is_that_of_the_whole_sequence(routed):
    net, one = routed
    segments = layer_of(net).segments
    assert (segments.before, segments.after) == (one.before, one.after)
    for odd in (0, one.odd):
        x = one.batch(6 * one.entries + odd)
        light = split_in_half(net, x)
        assert light.shape == (3, 6 if not odd else 7)
        assert (light[:, 1:] & ~light[:, :-1]).any(), "some go from full to light"
        assert (~light[:, 1:] & light[:, :-1]).any(), "and some from light to full"
        assert max(errors(net, x, light)) < EXACT


def test_without_what_comes_before_and_after_it_would_be_wrong(routed):
    net, one = routed
    x = one.batch(6 * one.entries)
    light = split_in_half(net, x)
    layer = layer_of(net)
    layer.segments = replace(layer.segments, before=0, after=0)
    assert worst(net, x, light) > 1e-3


def test_one_step_less_would_be_wrong(routed):
    net, one = routed
    x = one.batch(6 * one.entries)
    light = split_in_half(net, x)
    layer = layer_of(net)
    whole = layer.segments
    for side in ("before", "after"):
        if getattr(whole, side):
            layer.segments = replace(whole, **{side: getattr(whole, side) - whole.step})
            assert worst(net, x, light) > EXACT, side


def test_each_segment_is_scored_on_its_own_entries(routed):
    net, one = routed
    layer = layer_of(net)
    for odd in (0, one.odd):
        with torch.no_grad(), dslify.route(net, "both"):
            net(one.batch(3 * one.entries + odd))
        paths, frames = layer.paths, layer.segments.frames
        parts = paths.masked.split(frames, layer.segments.axis)
        layer.segments, before = None, layer.segments
        alone = torch.stack([layer.switch(layer.pooled(part)) for part in parts], 1).flatten()
        layer.segments = before
        assert paths.segments == len(parts)
        assert torch.allclose(paths.score, alone, rtol=1e-5)
        if not layer.segments.remainder(paths.masked):
            assert layer.pooled(paths.masked).shape == (3 * len(parts), frames, paths.masked.shape[layer.channel_axis])
        else:
            with pytest.raises(OptionError, match=f"whole segments of {one.entries} entries"):
                layer.pooled(paths.masked)


def test_answers_by_segment_are_rows_of_whole_ones():
    net, one = copied(inserted("frames")), SEQUENCES["frames"]
    layer = layer_of(net)
    x = one.batch(3 * one.entries)
    fine, coarse = answers(net, x, "full")
    assert by_segment(layer, (fine, coarse)) == (fine, coarse), "without segments nothing changes"
    dslify.route_every(net, one.entries)
    rows = by_segment(layer, (fine, coarse))
    assert [tuple(value.shape) for value in rows] == [(9, 16, 6), (9, 4, 4)]
    assert torch.equal(rows[0][4], fine[1, 16:32])
    assert torch.equal(rows[1][4], coarse[1, :, 4:8])
    short = answers(net, one.batch(8), "full")
    assert [len(value) for value in by_segment(layer, short)] == [3, 3], "shorter than a segment is one"
    with pytest.raises(OptionError, match="An answer of 23 entries is no whole number of segments, which have 16"):
        by_segment(layer, answers(net, one.batch(23), "full"))


def test_a_sequence_shorter_than_a_segment_is_routed_as_a_whole(routed):
    net, one = routed
    x = one.batch(one.entries - 8)
    light = split_in_half(net, x)
    assert light.shape == (3, 1)
    assert light.sum() == 1
    mixed = answers(net, x, "mixed")
    dslify.route_every(net, None)
    assert layer_of(net).segments is None
    assert all(torch.equal(a, b) for a, b in zip(mixed, answers(net, x, "mixed"), strict=True))


@pytest.mark.parametrize("path", ["full", "light"])
def test_segments_that_are_all_alike_run_once(path):
    net, one = copied(inserted("causal")), SEQUENCES["causal"]
    dslify.route_every(net, one.entries)
    layer, x = layer_of(net), one.batch(4 * one.entries)
    layer.threshold.fill_(float("inf") if path == "light" else 0.0)
    ran = []
    for name in ("full", "light"):
        getattr(layer, name).register_forward_pre_hook(lambda _, given, name=name: ran.append((name, given[0].shape)))
    mixed = answers(net, x, "mixed")
    assert ran == [(path, layer.paths.masked.shape)]
    assert layer.paths.light_taken.shape == (12,)
    assert torch.equal(mixed[0], answers(net, x, path)[0])


def test_windows_of_one_shape_are_one_batch():
    net, one = copied(inserted("causal")), SEQUENCES["causal"]
    dslify.route_every(net, one.entries)
    x = one.batch(8 * one.entries, size=6)
    split_in_half(net, x)
    calls = []
    for path in (layer_of(net).full, layer_of(net).light):
        path.register_forward_pre_hook(lambda _, given: calls.append(given[0].shape[0]))
    answers(net, x, "mixed")
    assert sum(calls) == 48
    assert len(calls) <= 8, "the first, the second, the inner and the last window, on two paths"


def test_gradients_pass_every_border():
    net, one = copied(inserted("symmetric")), SEQUENCES["symmetric"]
    dslify.route_every(net, one.entries)
    x = one.batch(4 * one.entries)
    light = split_in_half(net, x)
    given = answers_at_cut(net, x)
    layer = layer_of(net)
    size = layer.segments.outputs[0].at(layer.segments.frames)
    mixed = layer(given).split(size, 2)
    with dslify.route(net, "full"):
        full = layer(given).split(size, 2)
    with dslify.route(net, "light"):
        cheap = layer(given).split(size, 2)
    wanted = [
        (cheap if goes else full)[at][row].sum() for row, ways in enumerate(light) for at, goes in enumerate(ways)
    ]
    (found,) = torch.autograd.grad(sum(part.sum() for part in mixed), given)
    (right,) = torch.autograd.grad(sum(wanted), given)
    assert right.abs().max() > 0
    assert (found - right).abs().max() < EXACT * right.abs().max()


def answers_at_cut(net, x):
    with torch.no_grad(), dslify.route(net, "full"):
        net(x)
    return layer_of(net).paths.masked.clone().requires_grad_()


def test_saving_copying_removing_and_training_keep_it(tmp_path):
    net, one = copied(inserted("causal")), SEQUENCES["causal"]
    rows = dslify.cost(net)
    dslify.route_every(net, one.entries)
    times = 128 // one.entries
    for row, before in zip(dslify.cost(net), rows, strict=True):
        assert row.macs == (times * before.macs if row.name == "switch" else before.macs), "one score a segment"
    x = one.batch(5 * one.entries + 3)
    split_in_half(net, x)
    found = answers(net, x, "mixed")[0]
    loaded = dslify.load(dslify.save(net, tmp_path / "net.dsl"))
    for other in (copied(net), loaded):
        assert layer_of(other).segments == layer_of(net).segments
        assert torch.equal(answers(other, x, "mixed")[0], found)
    assert dslify.route_every(loaded, 2 * one.entries).frames == 2 * layer_of(net).segments.frames
    with torch.no_grad():
        assert torch.allclose(dslify.remove(net)(x), answers(net, x, "full")[0])
    net.train()
    net(x[..., : 5 * one.entries])
    paths = layer_of(net).paths
    assert (paths.segments, tuple(paths.score.shape)) == (5, (15,))
    assert paths.full[0].shape == paths.light[0].shape == (3, 6, 40), "both paths run on the whole sequence"


def test_a_compacted_network_routes_as_before():
    net, one = copied(inserted("causal")), SEQUENCES["causal"]
    dslify.route_every(net, one.entries)
    layer_of(net).mask.weight.data[:, ::2] = 0
    x = one.batch(4 * one.entries)
    split_in_half(net, x)
    small = dslify.compact(net)
    assert layer_of(small).segments == layer_of(net).segments
    assert torch.allclose(answers(small, x, "mixed")[0], answers(net, x, "mixed")[0], atol=1e-5)
    assert torch.equal(layer_of(small).paths.light_taken, layer_of(net).paths.light_taken)


def rewritten(path, change):
    """A .dsl file with other JSON."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    text = json.loads(members["dslify.json"])
    (layer,) = (node for node in text["net"]["modules"].values() if node and node["kind"] == "dsl")
    change(layer)
    members["dslify.json"] = json.dumps(text).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_files_of_before_load_and_damaged_ones_do_not(tmp_path):
    net = copied(inserted("causal"))
    dslify.route_every(net, 32)
    path = dslify.save(net, tmp_path / "net.dsl")
    with pytest.raises(StoreError, match=r"net\.dsl is damaged: OptionError: frames of a segment must be a multiple"):
        dslify.load(rewritten(path, lambda layer: layer["segments"].update(step=5)))
    dslify.save(net, path, force=True)
    with pytest.raises(StoreError, match="its segments belong to a region with other inputs or outputs"):
        dslify.load(rewritten(path, lambda layer: layer["segments"]["inputs"].append({"axis": None})))
    dslify.save(net, path, force=True)
    old = dslify.load(rewritten(path, lambda layer: layer.pop("segments")))
    assert layer_of(old).segments is None


class Placed(nn.Module):
    """What is behind the cut adds a ramp that begins where the sequence begins."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv1d(1, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x):
        y = self.conv(self.stem(x))
        return y + torch.arange(y.shape[2]).sin()


class Listening(nn.Module):
    """A recurrent layer behind the cut."""

    def __init__(self):
        super().__init__()
        self.stem, self.rnn = nn.Conv1d(1, 6, 4, 4), nn.LSTM(6, 6, batch_first=True)

    def forward(self, x):
        return self.rnn(self.stem(x).transpose(1, 2))[0]


def test_what_cannot_be_routed_by_segments_is_refused_and_the_network_stays_as_it_was():
    refused = {
        "Placed": (Placed, VerifyError, "by .* of the largest value: what it answers for a segment depends on where"),
        "Listening": (
            Listening,
            OptionError,
            r"The full path looks at the whole sequence at rnn \(aten\.lstm\.input\)",
        ),
    }
    for make, kind, words in refused.values():
        net = dslify.insert(make(), "stem", 0.5, (torch.randn(1, 1, 64),))
        with pytest.raises(kind, match=words):
            dslify.route_every(net, 16)
        assert layer_of(net).segments is None


def test_a_length_that_does_not_fit_and_inputs_without_one():
    net = copied(inserted("causal"))
    with pytest.raises(
        OptionError, match=r"route_every must be a multiple of 4 entries of the network's input.*got 30"
    ):
        dslify.route_every(net, 30)
    with pytest.raises(OptionError, match="route_every must be at least 1 entry of the network's input; got 0"):
        dslify.route_every(net, 0)
    picture = dslify.insert(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)), "0", 0.5, (torch.randn(1, 1, 8, 8),))
    with pytest.raises(OptionError, match="the inputs of this network have fixed sizes: 1x1x8x8"):
        dslify.route_every(picture, 4)
    assert layer_of(net).segments is layer_of(picture).segments is None


def test_a_second_layer():
    one = SEQUENCES["causal"]
    net = copied(inserted("causal"))
    x = (one.batch(128, 1),)
    twice = dslify.insert(net, "down", 0.5, x)
    with pytest.raises(OptionError, match="one Dynamic Switch Layer routes by segments, and this one holds 2"):
        dslify.route_every(twice, one.entries)
    dslify.route_every(net, one.entries)
    with pytest.raises(OptionError, match="--at down lies inside the full path of a layer that routes by segments"):
        dslify.insert(net, "down", 0.5, x)
    with pytest.raises(OptionError, match="and this one holds 2"):
        dslify.insert(copied(inserted("causal")), "down", 0.5, x, route_every=32)


def test_insert_does_it_too_and_so_does_the_command(tmp_path):
    one = SEQUENCES["frames"]
    with pytest.raises(OptionError, match="route_every is a number of entries of the network's input, at least 1"):
        dslify.insert(one.make(), one.at, 0.5, (one.batch(64, 1),), route_every=0)
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Conv1d(1, 4, 4, 4), nn.ReLU(), nn.Conv1d(4, 4, 3, padding=2)), tmp_path / "net.pt")
    command = ["insert", str(tmp_path / "net.pt"), "--at", "0", "--input", "1x1x128", "--width", "0.5"]
    found = CliRunner().invoke(app, [*command, "--route-every", "32"])
    assert found.exit_code == 0, found.output
    assert "by segments of 32 entries of the input, 8 at the cut; a path also sees 2 before and 0 after" in found.output
    assert layer_of(dslify.load(tmp_path / "net.dsl")).segments.entries == 32
    again = CliRunner().invoke(app, ["inspect", str(tmp_path / "net.dsl"), "--json"])
    assert json.loads(again.output)["segments"]["frames"] == 8
    wrong = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "two.dsl"), "--route-every", "30"])
    assert wrong.exit_code == 2
    assert not (tmp_path / "two.dsl").exists()
