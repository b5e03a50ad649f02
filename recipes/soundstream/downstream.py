"""Do nets that read the codec's embeddings still work when a switch routes the encoder? (arXiv 2404.04405)

Two tasks, as in the paper: which keyword was said, and how many people speak at once. A small probe learns from
embeddings (the encoder's output, before the quantizer) of the codec as it was, which are those of the **full** path. It
is then given those of the full, the light and the routed encoder for the same test clips, and those of random routing
at the routed one's share. Speakers of the three splits differ. The threshold is set on the task's own validation clips,
for the share that the paper sends light of speech: keywords are recorded at other levels than the codec's speech is.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

import dslify
from dslify.errors import DataError
from dslify.resampling import Resample
from dslify.samples import show_progress
from recipes.claims import Line
from recipes.soundstream.routes import FRAMES
from recipes.soundstream.tasks import Clips, Task, keywords, moved, speakers
from recipes.soundstream.work import MAIN, SEGMENT, SPEECH_SHARE, Work

WORDS = {"keywords": "which keyword was said", "speakers": "how many speak at once"}
ROUTES = ("full", "light", "mixed", "random")
COPIES = 3  # of each training clip, moved in time and level
EPOCHS, PATIENCE, BATCH, PEAK = 16, 5, 128, 4e-3  # PATIENCE: epochs without a better validation loss
LOST = 0.01  # of accuracy, that routing may cost

Examples = tuple[Tensor, Tensor]  # embeddings (n, channels, frames) and classes (n,)


class Probe(nn.Module):
    """Embeddings (batch, channels, frames) -> logits (batch, classes): convolutions, mean and deviation over time.

    Inputs are standardised by channel with the numbers of the training set.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, embeddings: Tensor, classes: int, width: int = 48) -> None:
        super().__init__()
        channels = embeddings.shape[1]
        self.register_buffer("mean", embeddings.mean((0, 2))[:, None])
        self.register_buffer("deviation", embeddings.std((0, 2)).clamp_min(1e-4)[:, None])
        layers: list[nn.Module] = []
        for inputs, stride in ((channels, 2), (width, 1), (width, 1)):
            layers += [nn.Conv1d(inputs, width, 5, stride, padding=2), nn.BatchNorm1d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Sequential(nn.Dropout(0.3), nn.Linear(2 * width, classes))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layers((x - self.mean) / self.deviation)
        return self.last(torch.cat([hidden.mean(2), (hidden.var(2, correction=0) + 1e-5).sqrt()], dim=1))


@torch.no_grad()
def embedded(net: nn.Module, sounds: Tensor) -> Tensor:
    """What the encoder makes of sounds (n, 1, samples): (n, channels, frames)."""
    return torch.cat([net.embed(batch) for batch in sounds.split(BATCH)])  # type: ignore[operator]


def learned(codec: nn.Module, task: Task) -> tuple[Examples, Examples]:
    """What probes learn from, and what ends their training. Clips to learn from come again, moved in time and level."""
    train, valid = task.clips["train"], task.clips["valid"]
    generator = torch.Generator().manual_seed(0)
    sounds = [train.sounds, *(moved(train.sounds, generator) for _ in range(COPIES - 1))]
    many = torch.cat([embedded(codec, copied) for copied in sounds])
    return (many, train.classes.repeat(COPIES)), (embedded(codec, valid.sounds), valid.classes)


@torch.no_grad()
def routed(net: nn.Module, sounds: Tensor) -> tuple[Tensor, Tensor]:
    """The embeddings as the layer routes them, and which segments went light: (n, segments) bool."""
    (layer,) = dslify.dsl_layers(net)
    found, taken = [], []
    with dslify.route(net, "mixed"):
        for batch in sounds.split(BATCH):
            found.append(embedded(net, batch))
            if layer.paths is None or layer.paths.light_taken is None:
                raise DataError("The codec's encoder did not run its layer; give one with a layer in its encoder.")
            taken.append(layer.paths.light_taken.view(len(batch), -1))
    return torch.cat(found), torch.cat(taken)


def calibrated(net: nn.Module, sounds: Tensor) -> None:
    """Set the threshold for SPEECH_SHARE of the segments of sounds (n, 1, samples), of which a rest is left out."""
    whole = sounds.shape[-1] // SEGMENT * SEGMENT
    dslify.calibrate(net, sounds[..., :whole], light_share=SPEECH_SHARE, progress=False)


def spliced(light: Tensor, full: Tensor, taken: Tensor) -> Tensor:
    """Segments of `light` where `taken`, (n, segments), and of `full` elsewhere; (n, channels, frames).

    Exactly what the layer gives for these choices: a segment's own path has the whole past as its context.
    """
    chosen = taken.repeat_interleave(FRAMES, dim=1)[:, None, : full.shape[-1]]
    return torch.where(chosen, light, full)


def at_random(taken: Tensor, generator: torch.Generator) -> Tensor:
    """As many segments light as in `taken`, (n, segments), dealt at random over all clips."""
    order = torch.randperm(taken.numel(), generator=generator)
    return taken.flatten()[order].view_as(taken)


def fit(train: Examples, valid: Examples, classes: int, seed: int) -> tuple[Probe, int]:
    """The probe with the best validation loss, and its epoch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = Probe(train[0], classes)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=PEAK, weight_decay=1e-2)
        steps = EPOCHS * -(-len(train[0]) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps, pct_start=0.1)
        best, kept, state = float("inf"), 0, copy.deepcopy(probe.state_dict())
        for epoch in range(1, EPOCHS + 1):
            probe.train()
            for at in torch.randperm(len(train[0])).split(BATCH):
                loss = F.cross_entropy(probe(train[0][at]), train[1][at], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            probe.eval()
            with torch.no_grad():
                held = F.cross_entropy(probe(valid[0]), valid[1]).item()
            if held < best:
                best, kept, state = held, epoch, copy.deepcopy(probe.state_dict())
            elif epoch - kept >= PATIENCE:
                break
        probe.load_state_dict(state)
    return probe.eval(), kept


def tried(net: nn.Module, probe: Probe, test: Clips, seed: int) -> tuple[dict[str, np.ndarray], float]:
    """Which test clips the probe gets right on every route, (n,) bool each; and the share of segments light."""
    given = {}
    for way in ("full", "light"):
        with dslify.route(net, way):
            given[way] = embedded(net, test.sounds)
    given["mixed"], taken = routed(net, test.sounds)
    dealt = at_random(taken, torch.Generator().manual_seed(seed))
    given["random"] = spliced(given["light"], given["full"], dealt)
    with torch.no_grad():
        right = {way: (probe(given[way]).argmax(1) == test.classes).numpy() for way in ROUTES}
    return right, taken.float().mean().item()


def compared(right: Sequence[dict[str, np.ndarray]], sources: Sequence[str]) -> dict[str, Any]:
    """Accuracies, and their differences from the full path's on the same clips: means over seeds, with 95 % intervals.

    right: of each seed. Intervals come from the bootstrap over sources, seeds averaged within each clip.
    """
    names = {source: at for at, source in enumerate(dict.fromkeys(sources))}
    resample = Resample(np.array([names[source] for source in sources]), len(names), 0)

    def told(column: np.ndarray) -> dict[str, Any]:
        mean = column.mean(0)
        interval = resample.interval(resample.means(mean))
        return {"value": float(mean.mean()), "interval": interval, "by_seed": column.mean(1).tolist()}

    columns = {way: np.stack([one[way] for one in right]).astype(float) for way in ROUTES}
    return {
        "accuracy": {way: told(column) for way, column in columns.items()},
        "difference": {way: told(columns[way] - columns["full"]) for way in ROUTES[1:]},
    }


def evaluated(work: Work, task: Task, nets: Sequence[nn.Module], progress: Progress) -> dict[str, Any]:
    """One task, with a probe and a retrofit for every seed."""
    test = task.clips["test"]
    bar = progress.add_task(f"{task.name}: embeddings", total=len(nets) + 1)
    train, valid = learned(work.codec, task)
    outcomes, shares, epochs, parameters = [], [], [], 0
    for seed, net in zip(work.seeds, nets, strict=True):
        progress.update(bar, advance=1, description=f"{task.name}: probe {seed}")
        probe, epoch = fit(train, valid, len(task.classes), seed)
        calibrated(net, task.clips["valid"].sounds)
        right, share = tried(net, probe, test, seed)
        outcomes.append(right)
        shares.append(share)
        epochs.append(epoch)
        parameters = sum(parameter.numel() for parameter in probe.parameters())
    progress.advance(bar)
    return {
        "classes": list(task.classes),
        "clips": {split: len(clips.classes) for split, clips in task.clips.items()},
        "test_sources": len(set(test.sources)),
        "most_common": torch.bincount(test.classes).max().item() / len(test.classes),
        "probe_parameters": parameters,
        "epochs": epochs,
        "share_light": shares,
        **compared(outcomes, test.sources),
    }


def run(work: Work) -> dict[str, Any]:
    """Both tasks, or the one whose data is there -> downstream.json. Needs the retrofits of MAIN."""
    begun = time.perf_counter()
    torch.set_num_threads(work.threads)
    nets = [work.net(MAIN, seed) for seed in work.seeds]
    with show_progress(None) as progress:
        tasks = [speakers(work.data), *([keywords(work.keywords)] if work.keywords is not None else [])]
        found = {task.name: evaluated(work, task, nets, progress) for task in tasks}
    content = {
        "variant": MAIN,
        "seeds": list(work.seeds),
        "tasks": found,
        "verdict": [line.to_json() for line in lines(found)],
        "seconds": time.perf_counter() - begun,
    }
    work.write("downstream.json", content)
    return content


def lines(tasks: Mapping[str, Any]) -> list[Line]:
    """What was to be shown: routing costs at most LOST; that says little where the light path alone costs no more."""
    return [
        Line(
            f"{WORDS[name]}: accuracy of mixed over full",
            task["difference"]["mixed"],
            ">=",
            -LOST,
            "" if task["difference"]["light"]["value"] < -LOST else "no gap: the light path alone costs no more",
        )
        for name, task in tasks.items()
    ]


def points_of(difference: float | None) -> str:
    """A difference of accuracies in points."""
    return "-" if difference is None else f"{100 * difference:+.1f}"
