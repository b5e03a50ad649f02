"""Capture: what becomes dynamic, what is guarded, and that nothing is shared or left changed."""

import linecache
import math
import re
import time
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import dslify
from dslify import deadline
from dslify.attempt import traced_copy
from dslify.capture import _WAY_OUT_SECONDS, capture, scope_inputs
from dslify.errors import CaptureError, CutError, OptionError
from dslify.example_inputs import example_for
from dslify.functional import functionalise, graphs_in, tensors_of, writes_in_place
from dslify.guards import Guards
from dslify.macs import count, node_macs

CLOSE = 1e-6  # relative: same kernels, other batch


def test_batch_and_length_vary_for_sound():
    model = nn.Sequential(nn.Conv1d(1, 4, 5, 2), nn.ELU(), nn.Conv1d(4, 2, 3))
    graph = capture(model, (torch.randn(1, 1, 400),))
    assert graph.dynamic == "batch and length vary"
    for shape in ((1, 1, 400), (3, 1, 400), (2, 1, 123)):
        x = torch.randn(shape)
        torch.testing.assert_close(graph.module(x), model(x), rtol=CLOSE, atol=CLOSE)
    with pytest.raises(OptionError, match=r"arg0_1 == 1.*got 2x3x400"):
        graph.module(torch.randn(2, 3, 400))


def test_images_keep_their_size():
    graph = capture(nn.Conv2d(3, 4, 3), (torch.randn(1, 3, 16, 16),))
    assert graph.dynamic == "batch varies, other axes are fixed"
    assert graph.module(torch.randn(5, 3, 16, 16)).shape == (5, 4, 14, 14)
    with pytest.raises(OptionError, match="arg0_2 == 16"):
        graph.module(torch.randn(5, 3, 18, 16))


class OneSample(nn.Module):
    def forward(self, x):
        return F.linear(x.reshape(1, 6), torch.ones(2, 6))


class FixedLength(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 4, 3), nn.Linear(4 * 28, 3)

    def forward(self, x):
        if not isinstance(x.shape[2], int):
            raise ValueError("my length is fixed")
        return self.b(self.a(x).flatten(1))


def test_what_cannot_vary_is_said():
    graph = capture(OneSample(), (torch.randn(1, 6),))
    assert graph.dynamic.startswith("every axis is fixed at the example's size (shape")
    graph = capture(nn.Conv1d(2, 4, 3), (torch.randn(1, 2, 30),))
    assert graph.dynamic == "batch and length vary; asked to vary but fixed: axis 1 of input at 2"
    graph = capture(FixedLength(), (torch.randn(1, 2, 30),))
    fixed = "axis 1 of x at 2, axis 2 of x at 30 (my length is fixed)"
    assert graph.dynamic == f"batch varies, other axes are fixed; asked to vary but fixed: {fixed}"
    assert graph.module(torch.randn(5, 2, 30)).shape == (5, 3)


class SlowToTrace(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x):
        while torch.compiler.is_exporting():
            try:
                time.sleep(0.02)
            except Exception:
                continue
        return self.part(x)


def test_a_time_limit_holds_over_all_attempts_and_names_the_line():
    model, start = SlowToTrace().eval(), time.perf_counter()
    with pytest.raises(CaptureError, match=r"at .*test_capture.py:\d+: torch.export took more than \d s.*--scope part"):
        capture(model, (torch.randn(2, 3, 4),), time_limit=3)
    assert 3 <= time.perf_counter() - start < 3 + _WAY_OUT_SECONDS
    assert not model.training
    assert capture(model.part, (torch.randn(2, 3, 4),)).dynamic.startswith("batch and length vary")


def test_waiting_for_a_processor_does_not_count(monkeypatch):
    begin = time.monotonic()
    monkeypatch.setattr(deadline, "own_time", lambda: begin + (time.monotonic() - begin) / 4)
    with deadline.limited(0.1):
        time.sleep(0.25)  # of which a sixteenth of a second is this thread's own
    with pytest.raises(deadline.OutOfTime), deadline.limited(0.1):
        time.sleep(1)
    assert 0.6 < time.monotonic() - begin < 1


def test_time_that_the_thread_slept_counts_as_its_own():
    begin = deadline.own_time()
    time.sleep(0.1)
    assert 0.05 < deadline.own_time() - begin < 10


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, *states):
        output, last = self.layer(x, states[0] if len(states) == 1 else states or None)
        return output * 2, last


class Named(nn.LSTM):
    pass


@pytest.mark.parametrize(
    ("layer", "shape", "states", "overload"),
    [
        (nn.LSTM(5, 6), (7, 2, 5), (), "lstm"),
        (Named(5, 6, 2, bidirectional=True, batch_first=True), (2, 7, 5), (), "lstm"),
        (nn.LSTM(5, 6, bias=False), (7, 2, 5), ((1, 2, 6), (1, 2, 6)), "lstm"),
        (nn.LSTM(5, 6), (7, 5), (), "lstm"),
        (nn.GRU(5, 6, 2, bidirectional=True), (7, 2, 5), (), "gru"),
        (nn.GRU(5, 6, batch_first=True, bias=False), (2, 7, 5), ((1, 2, 6),), "gru"),
        (nn.RNN(5, 6, 2), (7, 2, 5), (), "rnn_tanh"),
        (nn.RNN(5, 6, nonlinearity="relu", batch_first=True), (2, 7, 5), (), "rnn_relu"),
    ],
)
def test_recurrent_layers_stay_one_node(layer, shape, states, overload):
    model = Recurrent(layer).eval()
    graph = capture(model, (torch.randn(shape), *(torch.randn(state) for state in states)))
    nodes = [node for node in graph.module.graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in nodes if overload in str(node.target)] == [f"aten.{overload}.input"]
    assert not any("linear" in str(node.target) or "dslify" in str(node.target) for node in nodes)
    batch_first = len(shape) == 3 and layer.batch_first
    longer = {2: (9, 5), 3: (4, 9, 5) if batch_first else (9, 4, 5)}[len(shape)]
    more = [torch.randn(state[0], 4, state[2]) for state in states]
    x = torch.randn(longer)
    for mine, theirs in zip(tensors_of(graph.module(x, *more)), tensors_of(model(x, *more)), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.stride() == theirs.stride()
    (node,) = (node for node in nodes if overload in str(node.target))
    assert all(value.stride()[-1] == 1 for value in node.meta["val"])
    matrices = sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)
    assert sum(node_macs(graph.module, graph.args, graph.kwargs).values()) == math.prod(shape[:-1]) * matrices
    assert count(graph.module, *graph.args)[0] == math.prod(shape[:-1]) * matrices


class Packs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(4, 5, batch_first=True)

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
        return self.layer(packed)[1]


def test_packed_sequences_are_refused_by_name_and_work_again_afterwards():
    model, x = Packs().eval(), torch.randn(2, 5, 4)
    before = model(x)
    with pytest.raises(CaptureError, match="packs its sequences"):
        capture(model, (x,))
    assert torch.equal(model(x), before)


@dataclass
class Answer:
    y: torch.Tensor
    nothing: torch.Tensor | None = None


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(1, 8, 3, padding=1), nn.Conv1d(8, 8, 1), nn.Conv1d(8, 4, 1)

    def forward(self, x, *rest, scale=None, mask=None, **more):
        y = self.b(self.a(x) * mask) * scale + sum(rest) + more["odd"]["k"]
        return Answer(self.c(y))


def keyword_inputs(batch, length):
    args = (torch.randn(batch, 1, length), torch.randn(batch, 1, length))
    return args, {
        "odd": {"k": torch.randn(batch, 1, length)},
        "mask": torch.rand(batch, 1, length),
        "scale": torch.rand(batch, 8, 1),
    }


def test_keyword_arguments_come_in_any_order_and_dataclasses_go_through():
    model = Keywords().eval()
    args, kwargs = keyword_inputs(1, 20)
    graph = capture(model, args, kwargs)
    assert list(graph.kwargs) == ["scale", "mask", "odd"]
    assert graph.dynamic == "batch and length vary; asked to vary but fixed: axis 1 of scale at 8"
    args, kwargs = keyword_inputs(3, 33)
    for given in (kwargs, dict(reversed(kwargs.items()))):
        answer = graph.module(*args, **given)
        assert type(answer) is Answer
        assert answer.nothing is None
        assert torch.equal(answer.y, model(*args, **kwargs).y)
    with pytest.raises(OptionError, match="arg3_2 == arg0_2"):
        graph.module(*args, **{**kwargs, "mask": torch.rand(3, 1, 32)})
    assert "forward" not in vars(model)


def test_decoders_give_no_key_value_cache_unless_asked():
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=50,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    inputs = {"attention_mask": torch.ones(1, 9, dtype=torch.long), "input_ids": torch.randint(0, 50, (1, 9))}
    graph = capture(model, (), inputs)
    assert model.config.use_cache
    assert graph.dynamic == "batch and length vary; without key-value cache"
    inputs = {"input_ids": torch.randint(0, 50, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    found = graph.module(**inputs)
    assert type(found).__name__ == "CausalLMOutputWithPast"
    assert found.past_key_values is None
    torch.testing.assert_close(found.logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
WAVES = {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 16}
CODEC = {"encoder_hidden_size": 4, "decoder_hidden_size": 16, "downsampling_ratios": [8], "upsampling_ratios": [8]}
SPEECH = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
SPEECH |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_source_positions": 60, "num_mel_bins": 16}


@pytest.mark.parametrize(
    ("config", "inputs"),
    [
        (transformers.BertConfig(**SMALL), [(3, 5)]),
        (transformers.ViTConfig(**SMALL, image_size=32, patch_size=8), [(1, 3, 32, 32)]),
        (transformers.Wav2Vec2Config(**SMALL, **WAVES), [(1, 16000)]),
        (transformers.DacConfig(**CODEC, n_codebooks=1), [(1, 1, 16000)]),
        (transformers.WhisperConfig(**SPEECH), [(1, 16, 120), (1, 16)]),
    ],
)
def test_networks_of_transformers_bring_their_inputs_by_keyword(config, inputs):
    model = transformers.AutoModel.from_config(config).train()
    found = example_for(model)
    assert [tuple(value.shape) for value in (*found.args, *found.kwargs.values())] == inputs
    assert "proven by a forward pass" in found.words
    assert model.training


class Regions(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 4, 3), nn.Linear(4, 4)

    def forward(self, x):
        y = self.a(x)
        with torch.autocast("cpu", enabled=False):
            y.relu_()
            z = self.b(y.transpose(1, 2)).relu_()
        with torch.set_grad_enabled(True):
            w = self.b(z)
            w.add_(1)
        return w + y.mean(), z


class WritesFromRegion(Regions):
    def forward(self, x):
        y = self.a(x)
        part = y[:, :2]
        with torch.autocast("cpu", enabled=False):
            y.relu_()
            z = self.b(y.transpose(1, 2))
        return z, part


def test_regions_of_their_own_stay_and_write_nothing_in_place_where_nobody_sees_it():
    model, x = Regions().eval(), torch.randn(2, 2, 12)
    graph = capture(model, (x,))
    kinds = [str(node.target) for node in graph.module.graph.nodes]
    assert any("wrap_with_autocast" in kind for kind in kinds)
    assert any("wrap_with_set_grad_enabled" in kind for kind in kinds)
    assert not any(writes_in_place(node) for inner in graphs_in(graph.module) for node in inner.graph.nodes)
    assert sum(node_macs(graph.module, (x,), {}).values()) == 2 * 10 * (4 * 6 + 2 * 16)
    other = torch.randn(3, 2, 12)
    for mine, theirs in zip(graph.module(other), model(other), strict=True):
        assert torch.equal(mine, theirs)

    seen = WritesFromRegion().eval()
    graph = capture(seen, (x,))
    (writer,) = (node for node in graph.module.graph.nodes if writes_in_place(node))
    assert "wrap_with_autocast" in str(writer.target)
    for mine, theirs in zip(graph.module(other), seen(other), strict=True):
        assert torch.equal(mine, theirs)


def test_attempts_share_the_weights_and_the_capture_has_its_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.append(nn.Linear(4, 4))
    model[2].weight = model[0].weight
    copy = traced_copy(model)
    assert [id(p) for p in copy.parameters()] == [id(p) for p in model.parameters()]
    assert copy[1] is not model[1]
    graph = capture(model, (torch.randn(2, 4),)).module
    mine, theirs = ({t.data_ptr() for t in (*m.parameters(), *m.buffers())} for m in (graph, model))
    assert not mine & theirs


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x):
        h = self.encoder(x)
        return h[: int(h.sum().abs()) % 2 + 1]


def test_a_forward_that_depends_on_data_is_refused_and_cut_inside_its_scope():
    model = DataDependent().eval()
    x = torch.randn(2, 4)
    with pytest.raises(CaptureError, match=r"at .*test_capture.py:\d+: .*captured alone: --scope encoder\.") as caught:
        capture(model, (x,))
    assert "return h[: int(h.sum().abs())" in linecache.getline(
        __file__, int(re.findall(r"py:(\d+)", str(caught.value))[0])
    )
    outer = nn.ModuleDict({"before": nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "inner": model})
    outer.forward = lambda x: outer["inner"](outer["before"](x))
    with pytest.raises(CaptureError, match=r"--scope inner\.encoder, --scope before"):
        capture(outer, (x,))
    net = dslify.insert(model, "encoder.0", 0.5, (x,), scope="encoder")
    assert type(net) is DataDependent
    assert torch.equal(net(x), model(x))
    assert net.encoder[0] if isinstance(net.encoder, nn.Sequential) else len(dslify.dsl_layers(net)) == 1


@pytest.mark.parametrize(("scope", "words"), [("decoder", "no such submodule; the top ones are encoder"), ("", "")])
def test_scope_must_exist(scope, words):
    if not scope:
        assert scope_inputs(nn.Identity(), None, (1,))[1] == (1,)
        return
    with pytest.raises(CaptureError, match=words):
        scope_inputs(DataDependent(), scope, (torch.randn(2, 4),))


def test_wrong_example_is_one_sentence():
    with pytest.raises(CaptureError, match=r"does not run on the example input 1x7.*--input") as caught:
        capture(nn.Linear(4, 2), (torch.randn(1, 7),))
    assert "\n" not in str(caught.value)


class Inplace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 8, 3), nn.Conv1d(8, 8, 1)

    def forward(self, x):
        y = self.a(x)
        z = y.view(y.shape[0], 8, -1)
        y.relu_()
        return self.b(z) + y


def test_in_place_operators_become_functional_only_where_no_alias_sees_them():
    model = Inplace().eval()
    x = torch.randn(2, 2, 20)
    graph = capture(model, (x,))
    assert torch.equal(graph.module(x), model(x))
    assert [node.name for node in graph.module.graph.nodes if writes_in_place(node)] == ["relu_"]
    with pytest.raises(CutError, match="in place"):
        dslify.insert(model, "a", 0.5, (x,))
    plain = capture(nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(inplace=True), nn.Conv1d(8, 2, 1)), (x,))
    assert not any(writes_in_place(node) for node in plain.module.graph.nodes)
    assert functionalise(plain.module.graph) == ()


def test_tied_parameters_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    module = capture(model, (torch.randn(2, 4),)).module
    assert sorted(tuple(p.shape) for p in module.parameters()) == [(4,), (4,), (4, 4)]
    used = {node.target for node in module.graph.nodes if node.op == "get_attr" and "weight" in node.target}
    assert len({id(module.get_parameter(target)) for target in used}) == 1
    assert not {id(p) for p in module.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize(
    "line", ["__import__('os').getcwd()", "arg0_0.real", "open('x')", "(lambda: 1)()", "nobody == 1"]
)
def test_guards_from_a_file_evaluate_arithmetic_only(line):
    with pytest.raises(OptionError, match="cannot be evaluated"):
        Guards([line])(torch.zeros(2))
    Guards(["arg0_0 // 2 == 1", "min(arg0_0, 3) >= 2 and not arg0_0 == 5"])(torch.zeros(2))


def test_cut_points_have_costs_shapes_and_reasons():
    model = nn.Sequential(nn.Conv1d(1, 8, 4), nn.ReLU(), nn.Conv1d(8, 4, 1), nn.Flatten(), nn.Linear(4 * 99, 3))
    points = {point.path: point for point in dslify.cut_points(model, (torch.randn(2, 1, 102),))}
    assert points["0"].shape == ("*", 8, 99)
    assert points["0"].base_macs == 8 * 4 * 99
    assert points["0"].region_macs == 8 * 4 * 99 + 4 * 99 * 3
    assert points["2"].base_params == 8 * 4 + 8 + 8 * 4 + 4
    assert points["4"].reason == "nothing comes after it"
    assert list(points) == ["0", "1", "2", "3", "4"]


class SliceWrite(nn.Module):
    """Writes into slices before and behind the cut: nothing reads the value of the writing node itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(2, 8, 3), nn.Conv1d(8, 16, 1), nn.Conv1d(16, 4, 1)

    def forward(self, x):
        y = self.a(x)
        y[:, :2] = y[:, :2] * 3
        z = self.b(F.relu(y))
        z[:, 4:] = z[:, 4:] * 0.5
        return self.c(z)


def test_writes_into_slices_stay_with_the_memory_they_write():
    model = SliceWrite().eval()
    x = torch.randn(3, 2, 30)
    net = dslify.insert(model, "relu", 0.5, (x[:1],))
    with torch.no_grad():
        with dslify.route(net, "full"):
            assert torch.equal(net(x), model(x))
        with dslify.route(net, "light"):
            assert net(x).shape == model(x).shape
    with pytest.raises(CutError, match="writes into a value in place"):
        dslify.insert(model, "b", 0.5, (x[:1],))


class PadsByBuffers(nn.Module):
    """Strides and kernel sizes kept as buffers, as EnCodec does; the padding is reckoned from them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 5, 2)
        self.register_buffer("kernel", torch.tensor(5))
        self.register_buffer("stride", torch.tensor(2, dtype=torch.int32))

    def forward(self, x):
        frames = torch.ceil((x.shape[-1] - self.stride) / self.stride).to(torch.int64)
        wanted = (frames - 1) * self.stride + self.kernel
        return self.conv(nn.functional.pad(x, (0, wanted - x.shape[-1])))


def test_numbers_in_buffers_are_reckoned_with():
    model = PadsByBuffers()
    x = torch.randn(2, 2, 33)
    graph = capture(model, (x,))
    assert graph.dynamic.startswith("batch varies")
    assert list(dict(model.named_buffers())) == ["kernel", "stride"], "the given network is left as it was"
    assert type(model) is PadsByBuffers
    for batch in (1, 3):
        x = torch.randn(batch, 2, 33)
        torch.testing.assert_close(graph.module(x), model(x), rtol=CLOSE, atol=CLOSE)
