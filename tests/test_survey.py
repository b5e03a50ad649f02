"""What a cut would cost is what insert() then makes of it, and `auto` takes the cut that its rules name."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dslify
from dslify import cut_tree
from dslify.capture import Graph, capture, scope_inputs
from dslify.errors import CutError
from dslify.picture import draw, svg, write_picture
from dslify.survey import Survey, SurveyPoint, choose_cut
from tests.zoo import ZOO

# What an engineer would cut at; each network in its own words.
CHOICES = {
    "autoencoder": "encoder.block3",  # a third of the MACs, the narrowest value but for the code
    "resnet18": "layer1",  # the end of a stage, not of a block inside it
    "codec": "encoder.block1",  # where the recipe cuts
    "wav2vec2": "encoder.transformer.layers.0",
}


@functools.cache
def captured(name: str) -> Graph:
    network = ZOO[name]
    inner, args, kwargs = scope_inputs(network.build(), network.scope, (network.batch(1),))
    return capture(inner, args, kwargs)


def surveyed(name: str, width: float = 0.1, projection: bool = True) -> Survey:
    scope = ZOO[name].scope
    return Survey(captured(name), width, projection, f"{scope}." if scope else "")


def point(path: str, base: int = 300, light: int = 10, **more: object) -> SurveyPoint:
    """One of 1000 MACs."""
    given = {"value": path, "shape": ("*", 8), "bytes": 32, "block": True, "base_params": 1, "region_params": 1, **more}
    return SurveyPoint(path, base_macs=base, region_macs=1000 - base, light_macs=light, **given)


@pytest.mark.parametrize(
    ("name", "width", "projection"), [("unet", 0.1, True), ("codec", 0.1, True), ("resnet18", 0.25, False)]
)
def test_a_price_is_what_insert_makes(name: str, width: float, projection: bool):
    network = ZOO[name]
    found = surveyed(name, width, projection)
    at = network.at if "." in network.at or not network.scope else f"{network.scope}.{network.at}"
    priced = next(found.price(point) for point in found.points if point.path == at)
    example = (network.batch(1),)
    net = dslify.insert(network.build(), at, width, example, scope=network.scope, projection=projection)
    plan = dslify.dsl_layers(net)[0].plan
    assert (priced.light_macs, priced.light_params) == (plan.macs["light"], plan.params["light"])
    assert (priced.base_macs, priced.region_macs) == (plan.macs["base"], plan.macs["full"])
    assert priced.projections == plan.projections
    assert priced.crossing == plan.crossing
    assert len(priced.crossing_shapes) == len(priced.crossing)
    stays = [tensor for tensor in plan.tensors if tensor.before == tensor.after and "running" not in tensor.name]
    assert priced.frozen_params == sum(torch.Size(tensor.before).numel() for tensor in stays)


@pytest.mark.parametrize("name", CHOICES)
def test_auto_chooses_as_an_engineer_would(name: str):
    found = surveyed(name)
    chosen, why = found.auto()
    assert chosen.path == CHOICES[name]
    assert why.startswith(f"{chosen.path}, ")
    assert "of the MACs remain" in why
    assert len(found._known) <= 4  # of up to 60
    assert choose_cut(found.priced())[0] == chosen  # pricing everything first changes nothing


def test_each_value_is_priced_once_under_all_its_names(monkeypatch: pytest.MonkeyPatch):
    found = surveyed("resnet18")
    calls: list[object] = []
    price = found._light
    monkeypatch.setattr(found, "_light", lambda node: calls.append(node) or price(node))
    priced = {point.path: point for point in found.priced()}
    assert priced["layer1"].value == priced["layer1.1"].value
    assert priced["layer1"].light_macs == priced["layer1.1"].light_macs
    assert len(calls) == len({point.value for point in priced.values() if point.value})


def test_what_is_not_asked_for_is_not_priced():
    found = surveyed("resnet18").priced({"layer2"})
    assert [point.path for point in found if point.light_macs is not None] == ["layer2"]


def test_bytes_are_of_one_sample_and_count_what_crosses():
    found = {point.path: point for point in surveyed("unet").points}
    assert found["down1"].bytes == 16 * 16 * 16 * 4
    assert found["down2"].bytes == 32 * 8 * 8 * 4 + 16 * 16 * 16 * 4
    assert found["down2"].crossing_shapes == (("*", 16, 16, 16),)


RULES = {
    "the cheapest": ([point("a", 250), point("b", 400)], "a"),
    "enough before it": ([point("a", 150), point("b", 250)], "b"),
    "the nearest where none is in range": ([point("a", 100), point("b", 150), point("c", 700)], "b"),
    "a block before a layer": ([point("a.x", 250, block=False), point("b", 350)], "b"),
    "a layer where there is no block": ([point("a", 250, block=False), point("b", 100)], "a"),
    "nothing that crosses": ([point("a", 250, crossing_shapes=(("*", 4),)), point("b", 400)], "b"),
    "sizes may cross": ([point("a", 250, crossing_shapes=((),)), point("b", 400)], "a"),
    "no operator without a rule": ([point("a", 250, ledger=(("aten.flip.default", 1),)), point("b", 400)], "b"),
    "unless there is no other": ([point("a", 250, ledger=(("aten.flip.default", 1),))], "a"),
    "few bytes where costs are alike": ([point("a", 250, bytes=100), point("b", 280, bytes=50)], "b"),
    "not where they differ": ([point("a", 250, bytes=100), point("b", 350, bytes=50)], "a"),
    "the outermost name": ([point("a.1.x", 250), point("a", 250), point("a.1", 250)], "a"),
    "behind the pooling": ([point("a", 250, bytes=100), point("pool", 250, bytes=25, block=False)], "pool"),
    "behind the activation": ([point("0", 250, block=False), point("1", 250, value="r", block=False)], "1"),
    "a light path that is one": ([point("a", 250, light=740), point("b", 400)], "b"),
}


@pytest.mark.parametrize("name", RULES)
def test_the_rules_of_auto(name: str):
    points, path = RULES[name]
    assert choose_cut(points)[0].path == path
    assert choose_cut(list(points))[1].startswith(f"{path}, ")


def test_the_sentence_holds_the_figures():
    best, why = choose_cut([point("a", 250, light=30), point("b", 400)])
    assert why == (
        "a, the end of a block: 25 % of the MACs lie before it, nothing else crosses, and with 50 % of the inputs "
        "going light 64 % of the MACs remain; next best: b, 70 %."
    )
    assert best.expected_share == pytest.approx(0.25 + 0.5 * 0.03 + 0.5 * 0.75)
    why = choose_cut([point("a", 100, crossing_shapes=(("*", 4), ("*", 4)))])[1]
    assert "2 tensors besides it cross" in why
    assert "(no suitable cut has 20 to 50 % before it)" in why


@pytest.mark.parametrize(
    "points",
    [
        [],
        [SurveyPoint("a", reason="it is called 2 times")],
        [point("a", 250, light=740)],
        [point("a", 5), point("b", 900)],
        [SurveyPoint("a", value="a", light_macs=0)],  # a network without MACs
    ],
)
def test_no_suitable_cut_is_said(points: list[SurveyPoint]):
    with pytest.raises(CutError, match=r"^--at auto: of \d+ modules .* --at \(dslify inspect lists them\)\.$"):
        choose_cut(points)


class Odd(nn.Module):
    """One branch behind a cut holds what cannot be analysed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)).flip(-1))


def test_operators_without_a_rule_and_failures_are_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dslify.rules.RULES", {})
    monkeypatch.setattr("dslify.axes.RULES", {})
    points = {point.path: point for point in dslify.survey(Odd(), (torch.zeros(2, 4),))}
    assert dict(points["first"].ledger)["aten.linear.default"] == 2
    assert points["first"].light_macs is not None
    assert points["first"].frozen_params == 64 * 64 + 64 + 64 * 4 + 4

    def fails(*_: object, **__: object) -> None:
        raise KeyError("what")

    monkeypatch.setattr(sys.modules[Survey.__module__], "analyse", fails)
    points = {point.path: point for point in dslify.survey(Odd(), (torch.zeros(2, 4),))}
    assert points["first"].reason == "no light path can be derived behind it: 'what'"


def test_the_page_of_a_long_network_keeps_the_choice():
    points = [point(f"blocks.{at}{inner}", 10 * at) for at in range(100) for inner in (".norm", ".mlp", "")]
    shown = cut_tree.shown_paths(points, None, "blocks.37.mlp")
    assert "blocks.37.mlp" in shown
    assert cut_tree.FEW <= len(shown) <= cut_tree.PAGE
    assert set(cut_tree.shown_paths(points, 9)) == {point.path for point in points}
    assert {path.count(".") for path in cut_tree.shown_paths(points, 2)} == {1}


POINTS = [
    SurveyPoint("stem", reason="it is called 2 times"),
    *(point(f"blocks.{at}", 90 * at + 1, light=1000 - 90 * at) for at in range(10)),
    dataclasses.replace(point("head", 990), light_macs=None),
]


def test_a_picture_has_a_bar_for_each_priced_cut_that_fills_it():
    picture = draw(POINTS, "a < b", 0.1, auto="blocks.3")
    drawn = svg(picture)
    assert "a &lt; b" in drawn
    assert "prefers-color-scheme: dark" in drawn
    for at in range(10):
        base, light, saved = (s for s in picture.shapes if getattr(s, "note", "").startswith(f"blocks.{at}:"))
        assert [base.role, light.role, saved.role] == ["base", "light", "saved"]
        assert base.width / (base.width + light.width + saved.width) == pytest.approx((90 * at + 1) / 1000)
        assert light.x == pytest.approx(base.x + base.width)
        assert saved.x == pytest.approx(light.x + light.width)
        assert min(base.width, light.width, saved.width) >= 0
        assert saved.x + saved.width <= picture.width
    words = [shape for shape in picture.shapes if hasattr(shape, "text")]
    assert [shape.text for shape in words if shape.role == "mark"] == ["blocks.3", "--at auto"]
    assert all(0 <= shape.y <= picture.height for shape in picture.shapes)
    assert "head" not in {shape.text for shape in words}


def test_a_picture_of_a_long_network_stays_a_picture():
    for form in ("layer{}", "layers.{}.inner", "{}.a.b"):
        many = [point(form.format(at), at, light=1) for at in range(1000)]
        picture = draw(many, "long", 0.1, auto=form.format(501))
        names = [shape.text for shape in picture.shapes if getattr(shape, "align", "") == "end"]
        assert 30 <= len(names) <= 50
        assert form.format(501) in names


def test_pictures_by_suffix(tmp_path: Path):
    from PIL import Image

    picture = draw(POINTS, "all", 0.1, auto="blocks.3")
    for suffix in (".svg", ".html", ".png"):
        write_picture(picture, tmp_path / f"p{suffix}", POINTS)
    image = Image.open(tmp_path / "p.png")
    assert image.size == (round(2 * picture.width), round(2 * picture.height))
    assert len(image.getcolors(1 << 20) or []) > 4
    page = (tmp_path / "p.html").read_text()
    assert page.count("<tr>") == len(POINTS) + 1
    assert "it is called 2 times" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.html", "p.png", "p.svg"]
