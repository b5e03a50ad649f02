"""Figures and tables of the codec recipe: what they show is what was measured, and what is missing is said."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import dslify
from dslify.errors import DataError
from recipes.soundstream import CUT, SoundStream, tables
from recipes.soundstream.clips import Clip
from recipes.soundstream.curves import Inside, listened, sweep, switched
from recipes.soundstream.routes import Heard, decoded
from recipes.soundstream.spectral import LogMelDistance
from recipes.soundstream.work import SEGMENT, Work

pytest.importorskip("matplotlib")
from recipes.soundstream import figures

SMALL = 80_000  # bytes of a picture


def clip(segments: int, seed: int = 0, kind: str = "speech", rest: int = 0) -> Clip:
    generator = np.random.default_rng(seed)
    sound = (0.1 * generator.standard_normal(segments * SEGMENT - rest)).astype(np.float32)
    sound[: 2 * SEGMENT] *= 0.02
    places = ("pause",) * 2 + ("edge",) + ("speech",) * (segments - 3)
    return Clip(f"{kind}-{seed}", kind, sound, places if kind == "speech" else ("",) * segments)


def of(predicted: list[float], actual: list[float]) -> Heard:
    nothing = torch.zeros(1, 32, 16 * len(predicted))
    return Heard(nothing, nothing, np.array(predicted), np.array(actual))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def is_small_picture(path: Path) -> bool:
    content = path.read_bytes()
    return content.startswith(b"\x89PNG") and len(content) < SMALL


class Unquantized(torch.nn.Module):
    """Codebooks that have not been learned give the same for everything."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x,)


@pytest.fixture(scope="module")
def net() -> SoundStream:
    torch.manual_seed(0)
    net = switched(SoundStream().eval())
    (layer,) = dslify.dsl_layers(net)
    layer.scale.fill_(1.0)
    net.quantizer = Unquantized()
    return net


def test_a_layer_for_the_figures_is_cheap_and_routes_by_segments(net):
    (layer,) = dslify.dsl_layers(net)
    assert layer.segments.entries == SEGMENT
    costs = {row.name: row.macs for row in dslify.cost(net)}
    assert 0.01 * costs["full"] < costs["light"] < 0.1 * costs["full"]


def test_a_routed_sound_says_which_segment_went_where(tmp_path):
    predicted = [0.1, 0.1, 0.5, 0.6, 0.2, 0.7]
    found = figures.routed_sound(tmp_path, clip(6, rest=900), of(predicted, [0.1] * 6), 0.3)
    rows = rows_of(tmp_path / "routed_sound.csv")
    assert [row["path"] for row in rows] == ["light", "light", "full", "full", "light", "full"]
    assert [float(row["predicted"]) for row in rows] == predicted
    assert [float(row["start_s"]) for row in rows] == pytest.approx([0.32 * at for at in range(6)])
    assert rows[0]["place"] == "pause"
    assert found["share_light"] == 0.5
    assert is_small_picture(tmp_path / "routed_sound.png")


def test_the_typical_recording_has_the_median_share(net):
    found = [(clip(4, seed), of([0.1] * seed + [0.9] * (4 - seed), [0.1] * 4)) for seed in (0, 1, 3)]
    noise = (clip(4, 9, "silence"), of([0.1, 0.9, 0.9, 0.9], [0.1] * 4))
    chosen, one = figures.typical([*found, noise], 0.5)
    assert chosen.name == "speech-1"
    assert (one.predicted < 0.5).sum() == 1


def test_inside_takes_segments_of_speech_alone():
    found = [
        (clip(6, 0), of([9, 9, 9, 0.1, 0.2, 0.3], [9, 9, 9, 0.1, 0.2, 0.4])),
        (clip(5, 1), of([9, 9, 9, 0.4, 0.5], [9, 9, 9, 0.6, 0.3])),
        (clip(4, 2, "ambient"), of([9.0] * 4, [9.0] * 4)),
    ]
    inside = Inside.of(found)
    assert inside.predicted.tolist() == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert inside.file.tolist() == [0, 0, 0, 1, 1]
    value, interval = inside.spearman()
    # the ranks 1 2 3 4 5 against 1 2 4 5 3
    assert value == pytest.approx(1 - 6 * (0 + 0 + 1 + 1 + 4) / (5 * 24))
    assert interval is not None
    with pytest.raises(DataError, match=r"No recording has a segment of speech; segments\.csv"):
        Inside.of(found[2:])


def test_a_sweep_goes_from_all_full_to_all_light(net):
    clips = [clip(6, 0, rest=700), clip(5, 1), clip(4, 2, "silence")]
    found = listened(net, clips)
    told: list[str] = []
    rows = sweep(net, found, told.append)
    far = LogMelDistance()
    for kind in ("speech", "silence"):
        mine = [row for row in rows if row["kind"] == kind]
        shares = [row["share"] for row in mine]
        assert shares == sorted(shares)
        assert (shares[0], shares[-1]) == (0.0, 1.0)
        members = [(each, one) for each, one in found if each.kind == kind]
        for row, path in ((mine[0], "full"), (mine[-1], "light")):
            outputs = [decoded(net, getattr(one, path), len(each.sound)) for each, one in members]
            pairs = zip(members, outputs, strict=True)
            wanted = [
                far(*(torch.from_numpy(x)[None, None] for x in (each.sound, output))).item()
                for (each, _), output in pairs
            ]
            assert row["distance"] == pytest.approx(np.mean(wanted), rel=1e-5)
        assert mine[0]["from_full"] == 0.0
        assert mine[-1]["from_full"] > 0.1
    assert len(told) == len({row["threshold"] for row in rows})


def test_every_curve_becomes_a_small_picture_and_its_numbers(tmp_path):
    sweep_rows = [
        {"threshold": at / 4, "kind": kind, "share": at / 4, "distance": 4.0, "from_full": at / 10}
        for at in range(5)
        for kind in ("speech", "silence")
    ]
    at_points = {name: {"visqol": {"value": 4.0}} for name in ("full", "light", "mixed at speech", "mixed at silence")}
    routes = {"speech": at_points, "silence": at_points}
    for known in (None, routes):
        figures.share_and_quality(tmp_path, sweep_rows, {"speech": 0.4, "silence": 0.6}, known)
    masks = [
        {"mask": kind, "beta": beta, "step": step, "zeros": step / 100 * (beta > 1e-3), "anchor": 0.0}
        for kind in figures.MASKS
        for beta in figures.BETAS
        for step in (10, 20, 30)
    ]
    ends = figures.draw_mask_sparsity(tmp_path, masks)["at_the_end"]
    assert {row["step"] for row in ends} == {30}
    generator = np.random.default_rng(0)
    actual = generator.uniform(0.05, 0.5, 300)
    inside = Inside(actual * generator.uniform(0.9, 1.1, 300), actual, np.arange(300) // 30)
    error = [{"steps": steps, "error": 1 / steps, "spearman": 0.9} for steps in figures.SWITCH_STEPS]
    assert figures.predicted_actual(tmp_path, inside, error)["spearman"] > 0.95
    cuts = [{"cut": cut, "spearman": 0.9, "low": 0.8, "high": 0.95, "unseen": 0.1} for cut in figures.CUTS]
    figures.draw_earlier_cuts(tmp_path, cuts)
    assert CUT in figures.CUTS
    names = ("share_and_quality", "mask_sparsity", "predicted_actual", "earlier_cuts")
    assert all(is_small_picture(tmp_path / f"{name}.png") for name in names)
    assert len(rows_of(tmp_path / "share_and_quality.csv")) == 10
    assert len(rows_of(tmp_path / "mask_sparsity.csv")) == len(masks)
    assert len(rows_of(tmp_path / "predicted_actual.csv")) == 300
    assert [row["cut"] for row in rows_of(tmp_path / "earlier_cuts.csv")] == list(figures.CUTS)
    assert [float(row["error"]) for row in rows_of(tmp_path / "switch_error.csv")] == pytest.approx(
        [1 / steps for steps in figures.SWITCH_STEPS], rel=1e-5
    )


def value(number: float | None, spread: float | None = 0.01) -> dict[str, object]:
    interval = None if spread is None or number is None else (number - spread, number + spread)
    return {"value": number, "interval": interval, "by_seed": [number]}


def stages() -> dict[str, dict]:
    """Small results of the stages, in the form that they write."""
    routes = {
        name: {"visqol": value(3.0 + at / 100), "log_mel_db": value(2.0), "share_light": value(at / 10)}
        for at, name in enumerate(("full", "light", "mixed", "random", "oracle", "loudness"))
    }
    ranks = {"switch": value(0.961), "loudness": value(0.9), "switch over loudness": value(0.061)}
    quality = {
        "routes": {"speech": routes, "silence": routes},
        "over": {"speech": {"full over light": value(0.043)}},
        "spearman": {"as recorded": {"speech segments": ranks}},
        **{f"share_at_{name}": {place: value(0.25) for place in ("speech", "pause", "edge")}
           for name in ("speech", "silence")},
        "verdict": [
            {"what": "light under full", "value": 0.043, "interval": [0.02, 0.06], "sign": ">=", "bound": 0.1,
             "words": "no gap: the codec has no use of routing", "holds": False},
            {"what": "mixed over random", "value": 0.04, "interval": None, "sign": ">=", "bound": 0.03,
             "words": "no gap", "holds": None},
            {"what": "pauses light", "value": 0.97, "interval": None, "sign": ">=", "bound": 0.95, "words": "",
             "holds": True},
        ],
    }  # fmt: skip
    task = {
        "classes": ["no", "yes"], "clips": {"train": 9, "valid": 5, "test": 7}, "test_sources": 3, "most_common": 0.5,
        "probe_parameters": 31540, "share_light": [0.2, 0.4],
        "accuracy": {way: value(0.8) for way in ("full", "light", "mixed", "random")},
        "difference": {"light": value(-0.052), "mixed": value(-0.004), "random": value(-0.03)},
    }  # fmt: skip
    names = ("full", "light", "mixed, 80 % light", "mixed, 30 % light")
    row = {"us": 471.3, "saved": 0.412, "share_light": 0.8, "computed_us": 460.0, "computed_saved": 0.423, "off": 0.01}
    latency = {
        "segments": 412, "segment_seconds": 0.32, "rounds": 9, "one_call_us": {"onnx": 400.0, "eager": 900.0},
        "runtimes": {"ONNX Runtime": dict.fromkeys(names, row), "PyTorch": dict.fromkeys(names, row)},
        "sizes": {"0.16 s": dict.fromkeys(names, row)},
    }  # fmt: skip
    part = {"params": 3072, "macs": 430_000, "words": "width only", "fewer": {"params": 21.0, "macs": 12.4},
            "difference": {"test": {"value": 0.18, "range": [0.17, 0.19]}},
            "switch": {"speech": value(0.97)}, "loudness": {"speech": value(0.9)}}  # fmt: skip
    variants = {"full": {"params": 64496, "macs": 5_248_000}, "steps": {"light": 800}, "variants": {"narrow": part}}
    return {
        "latency": latency,
        "variants": variants,
        "quality": quality,
        "downstream": {"tasks": {"speakers": task}, "verdict": [], "seeds": [0]},
    }


def test_what_has_not_run_is_said_and_nothing_is_filled_in(tmp_path):
    work = Work(tmp_path, tmp_path)
    found = tables.run(work)
    text = (tmp_path / "tables.md").read_text()
    assert found["verdict"] == []
    assert found["missing"] == ["retrofit", "quality", "downstream", "latency", "figures"]
    for stage in found["missing"]:
        assert f"python -m recipes.soundstream.evaluate --only {stage}" in text
    assert "holds" not in text


def test_the_page_shows_every_figure_beside_the_papers(tmp_path):
    work = Work(tmp_path, tmp_path)
    for name, content in stages().items():
        work.write(f"{name}.json", content)
    found = tables.run(work)
    lines = (tmp_path / "tables.md").read_text().splitlines()
    assert found["missing"] == ["figures"]
    times = "471.3 | 42.3 % | 41.2 %"
    assert f"| mixed, 80 % light | 10.84 ms | 26.5 % | {times} | {times} |" in lines
    assert (
        "| narrow: width only | 3,072 | 21.0x | 430.0 k | 12.4x | 0.180 [0.170 0.190] | 0.970 [0.960 0.980] |"
        in "".join(lines)
    )
    words = "**does not hold**; no gap: the codec has no use of routing"
    assert f"| light under full | 0.043 [0.020 0.060] | >= 0.1 | {words} |" in lines
    assert "| mixed over random | 0.040 | >= 0.03 | **not judged**; no gap |" in lines
    assert "| pauses light | 0.970 | >= 0.95 | holds |" in lines
    assert "| speech, mixed | 20 % | 3.020 [3.010 3.030] | 4.34 | 2.00 [1.99 2.01] |" in lines
    assert "| silence, full | 0 % | 3.000 [2.990 3.010] | 4.51 | 2.00 [1.99 2.01] |" in lines
    assert "| how many speak at once, mixed | 80.0 % [79.0 81.0] | -0.4 [-1.4 +0.6] | 96.3 % |" in lines
    (note,) = (line for line in lines if line.startswith("- how many speak at once: 2 classes"))
    assert "30 % of their segments light" in note
    assert json.loads((tmp_path / "quality.json").read_text())["verdict"] == found["verdict"]
