"""`dslify demo`: the whole path on a trained codec and on sound that the project ships, in a few minutes, offline."""

from __future__ import annotations

import importlib
import json
import shutil
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import soundfile
import torch
from rich.text import Text
from torch import nn

from . import report
from .calibrate import Calibration, calibrate
from .console import Output
from .cost import Cost, cost
from .data import open_data
from .errors import LoadError, OptionError
from .files import written_whole
from .insert import insert
from .measure import Evaluation, evaluate
from .runs import History
from .samples import Samples, expected_shape, split
from .store import save
from .switch import Route, dsl_layers, route
from .train import finetune

RECIPE = "recipes.soundstream"
RATE = 16_000
WIDTH = 0.2  # 16 times fewer MACs; the paper has 12.3
STEPS, SWITCH_STEPS = 1500, 600
MAX_DIFFERENCE = 0.05  # mean relative difference from the full path that routing may cost
SEED = 0
THREADS = 1  # the same numbers on every number of cores; the networks are too small to gain from more
PARTS = ("train", "valid", "test")
ROUTES: tuple[Route, ...] = ("full", "mixed", "light")  # that the clip to listen to is coded on
RUN = "demo.run"
FILES = {
    "codec.dsl": "the codec with its Dynamic Switch Layer: dslify.load(..., into=codec)",
    "speech_original.flac": "two voices of the test",
    "speech_full.flac": "the same, coded with the full path",
    "speech_mixed.flac": "coded as the switch chooses",
    "speech_light.flac": "coded with the light path only",
    "report.json": "every figure above",
    f"{RUN}/": "losses, checkpoints, TensorBoard logs",
}


@dataclass(frozen=True)
class Demo:
    """What the demo found, in the order of its steps. files: written, by name."""

    costs: tuple[Cost, ...]
    history: History
    calibration: Calibration
    evaluation: Evaluation
    files: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Everything but the time is the same in every run on one machine."""
        training = self.history.to_json()
        for phase in training["phases"]:
            del phase["losses"]  # they lie in the run folder
        return {
            "cost": [row.to_json() for row in self.costs],
            "training": training,
            "calibration": self.calibration.to_json(),
            "evaluation": self.evaluation.to_json(),
            "files": list(self.files),
            "seconds": round(self.seconds, 1),
        }


def run(folder: Path, out: Output) -> Demo:
    """Everything, with its files in `folder`; those of an earlier demo are replaced.

    Raises LoadError where the recipe or its sound is not installed, OptionError for a folder with other things in it.
    """
    started = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        return _run(folder, out, started)
    finally:
        torch.set_num_threads(threads)


def _run(folder: Path, out: Output, started: float) -> Demo:
    codec, cut, sound = _recipe()
    _clear(folder)
    parameters = sum(parameter.numel() for parameter in codec.parameters())
    out.show(
        _bold(f"1. A speech codec, {report.human(parameters)} parameters. Its encoder is cut behind {cut}:"),
        "   what follows gets a light path that inherits the strongest channels, and a switch that chooses.",
        "",
    )
    with out.working("cutting the codec and deriving its light path"):
        net = insert(codec, cut, WIDTH, (codec.example_input_array,), scope="encoder", projection=False, seed=SEED)
    (layer,) = dsl_layers(net)
    costs = cost(net)
    out.show(report.surgery(costs, layer.plan), "")

    out.show(_bold("2. Fine-tuning: the light path on train, the switch on half of valid; the rest stays as it is."))
    shape = expected_shape(net)
    train, valid, test = (open_data(sound / name, shape, rate=RATE, progress=out.progress) for name in PARTS)
    lengths = ", ".join(
        f"{name} {part.report.seconds:.0f} s" for name, part in zip(PARTS, (train, valid, test), strict=True)
    )
    out.show(f"   Sound: {lengths}, of {', '.join(sorted(set(test.labels)))}.", "")
    for_switch, for_threshold = split(valid, (0.5, 0.5), SEED)
    history = finetune(
        net,
        train,
        switch_data=for_switch,
        steps=STEPS,
        switch_steps=SWITCH_STEPS,
        run_dir=folder / RUN,
        checkpoint_every=500,
        seed=SEED,
        fit=False,  # after so many steps a least-squares start ends no lower, and predicts worse
        threads=THREADS,
        progress=out.progress,
    )
    out.show(report.training(history), "")

    out.show(
        _bold("3. The threshold, on the other half of valid: as high as it may be for the difference allowed."),
        "",
    )
    calibration = calibrate(net, for_threshold, max_difference=MAX_DIFFERENCE, progress=out.progress)
    out.show(report.calibration(calibration), "")

    out.show(_bold("4. The test, on voices and sounds that nothing above has heard."), "")
    evaluation = evaluate(net, test, seed=SEED, progress=out.progress)
    out.show(report.evaluation(evaluation), "", _bold(_in_short(evaluation)), "")

    _listen(net, test, folder)
    save(net, folder / "codec.dsl", force=True)
    found = Demo(costs, history, calibration, evaluation, tuple(FILES), time.perf_counter() - started)
    with written_whole(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(found.to_json(), indent=1, allow_nan=False) + "\n")
    out.show(_bold(f"5. Written to {folder}/ ({found.seconds:.0f} s in all):"))
    out.show(*(f"   {name:<22}{about}" for name, about in FILES.items()), "")
    out.next("evaluate", str(folder / "codec.dsl"), "--data", _shown(sound / "test"), "--by", "source")
    return found


def _in_short(evaluation: Evaluation) -> str:
    """The outcome in two sentences."""
    shares = {kind.label: report.percent(kind.share) for kind in evaluation.kinds}
    full, mixed, random = (evaluation[name] for name in ("full", "mixed", "random"))
    saved = report.percent(1 - (mixed.macs or 0) / full.macs) if full.macs else "-"
    return (
        f"In short: {shares['silence']} of the silence and {shares['speech']} of the speech take the light path, which "
        f"saves {saved} of the\nencoder's MACs at a mean difference of {report.figure(mixed.difference)}; choosing the "
        f"same share at random costs {report.figure(random.difference)}."
    )


def _shown(path: Path) -> str:
    """Shorter where it lies in the working folder."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _bold(text: str) -> Text:
    return Text(text, "bold")


def _clear(folder: Path) -> None:
    """Makes the folder, or takes one that an earlier demo made; another one is refused, so that no file is lost."""
    if folder.exists() and not (folder.is_dir() and ((folder / RUN).is_dir() or not any(folder.iterdir()))):
        raise OptionError(f"{folder} holds other things than an earlier demo's; name a new folder with --output.")
    shutil.rmtree(folder / RUN, ignore_errors=True)
    (folder / RUN).mkdir(parents=True)


def _recipe() -> tuple[nn.Module, str, Path]:
    """The codec, its cut and the folder of sound: from a checkout or from the installed package."""
    try:
        model = importlib.import_module(f"{RECIPE}.model")
        sound = Path(str(resources.files(RECIPE) / "demo_sound"))
    except ModuleNotFoundError as error:
        raise LoadError(
            f"The demo needs {error.name}, which is not installed; install dslify with its soundstream extra: "
            "pip install 'dslify[soundstream]'."
        ) from error
    if not sound.is_dir():
        raise LoadError(f"The demo's sound is not at {sound}; install dslify again, or run the demo from a checkout.")
    return model.pretrained(), model.CUT, sound


def _listen(net: nn.Module, test: Samples, folder: Path) -> None:
    """The test's first two voices, coded on each route, as files to listen to."""
    voices = [source for source in dict.fromkeys(test.sources) if source.startswith("speech")][:2]
    positions = [at for at, source in enumerate(test.sources) if source in voices]
    sounds = {"original": test.batch(positions)}
    for mode in ROUTES:
        with torch.no_grad(), route(net, mode):
            sounds[mode] = net(sounds["original"])
    for name, sound in sounds.items():
        path = folder / f"speech_{name}.flac"
        with written_whole(path) as temporary:
            soundfile.write(temporary, sound.flatten().clamp(-1, 1).numpy(), RATE, format="FLAC", subtype="PCM_16")
