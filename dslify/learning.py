"""The commands after the surgery: finetune, calibrate and evaluate. cli.py puts them beside the others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from . import options as o
from .console import Output, dslified, read_data, size_of
from .errors import OptionError
from .named import named_function
from .options import hertz, number, numbers, run_folder, runs_beside, seconds, whole, words
from .processes import place

if TYPE_CHECKING:
    from .samples import Samples


def finetune(
    file: o.File,
    data: o.Data,
    switch_data: o.SwitchData = None,
    steps: o.Steps = "800",
    switch_steps: o.SwitchSteps = "400",
    batch_size: o.BatchSize = "16",
    lr: o.LearningRate = "0.003",
    alpha: o.Alpha = "1",
    beta: o.Beta = "0",
    anchor: o.Anchor = "1",
    positive: o.Positive = None,
    loss: o.Loss = "l1",
    weights: o.Weights = None,
    precision: o.Precision = "32-true",
    accumulate: o.Accumulate = "1",
    patience: o.Patience = None,
    joint: o.JointModel = None,
    task_loss: o.TaskLoss = None,
    joint_steps: o.JointSteps = "400",
    joint_lr: o.JointRate = "0.0003",
    routes: o.Routes = "full",
    trust: o.Trust = None,
    code: o.Code = None,
    arch: o.Arch = None,
    rate: o.Rate = None,
    segment: o.Segment = None,
    labels: o.Labels = None,
    workers: o.Workers = "0",
    copies: o.Copies = "0",
    vary_by: o.Vary = None,
    noise: o.Noise = None,
    fit: o.Fit = True,
    resume: o.Resume = False,
    run_dir: o.RunDir = None,
    checkpoint_every: o.CheckpointEvery = "100",
    seed: o.Seed = "0",
    threads: o.Threads = None,
    output: o.Write = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train the light path to answer like the full one, and the switch to predict how far off it is; a gate learns
    from labels.

    In several processes: torchrun --nproc-per-node=2 -m dslify finetune ...
    """
    options: dict[str, Any] = {
        "steps": whole("steps", steps),
        "switch_steps": whole("switch-steps", switch_steps),
        "batch_size": whole("batch-size", batch_size, least=1),
        "lr": number("lr", lr, "above 0", above=0),
        "alpha": number("alpha", alpha, "above 0", above=0),
        "beta": number("beta", beta, "0 or above", least=0),
        "anchor": number("anchor", anchor, "0 or above", least=0),
        "positive": positive,
        "loss": words(loss),
        "weights": numbers("weights", weights),
        "precision": precision,
        "accumulate": whole("accumulate", accumulate, least=1),
        "patience": None if patience is None else whole("patience", patience, least=1),
        "checkpoint_every": whole("checkpoint-every", checkpoint_every, least=1),
        "seed": whole("seed", seed),
        "fit": fit,
        "threads": None if threads is None else whole("threads", threads, least=1),
    }
    rate_hz, length = hertz(rate), seconds(segment)
    if (joint is None) != (task_loss is None):
        raise OptionError("--joint and --task-loss go together: the plain network, and what its training minimises.")
    together: dict[str, Any] = {"steps": whole("joint-steps", joint_steps, least=1), "routes": routes}
    together["lr"] = number("joint-lr", joint_lr, "above 0", above=0)
    first = place().rank == 0  # of several processes one writes and prints
    with Output(as_json and first, quiet or not first) as out:
        net = dslified(file)
        from . import Joint, load_model, report, save
        from . import finetune as train
        from .sparsity import mask_words
        from .switch import dsl_layers

        if joint is not None and task_loss is not None:
            plain = load_model(joint, trust=trust or (), code=code or (), arch=arch)
            options["joint"] = Joint(plain, named_function(task_loss, "--task-loss"), **together)
            net = dslified(file, into=plain)  # the task may be about more than the scope
        folder = run_dir or run_folder(file, resume)
        read = partial(read_data, net, rate=rate_hz, segment=length, out=out, workers=workers)
        varied = _copier(read, out, copies, vary_by, noise, options["seed"])
        samples = varied(read(data, labels=labels))
        others = None if switch_data is None else varied(read(switch_data, labels=labels))
        try:
            history = train(
                net, samples, switch_data=others, run_dir=folder, resume=resume, progress=out.progress, **options
            )
        except KeyboardInterrupt:
            if not (folder / "config.json").exists():
                raise
            raise KeyboardInterrupt(f"go on with the same command and --resume --run-dir {folder}") from None
        written = save(net, output or file, force=True) if first else file
        masks = [mask_words(layer) for layer in dsl_layers(net)]
        out.document = {"file": str(written), "run_dir": str(folder), "masks": masks, **history.to_json()}
        wrote = f"wrote {written} ({size_of(written)}) and {folder}/ (logs, checkpoints)"
        out.show(report.training(history), *(f"mask: {mask}" for mask in masks), "", wrote)
        out.next("calibrate", str(written), "--data", "OTHER_FOLDER", "--light-share", "0.5")


def calibrate(
    file: o.File,
    data: o.Data,
    light_share: o.LightShare = None,
    max_difference: o.MaxDifference = None,
    guarantee: o.Guarantee = None,
    confidence: o.Confidence = None,
    bound: o.Bound = None,
    metric: o.Metric = None,
    max_metric: o.MaxMetric = None,
    positive: o.Positive = None,
    max_lost: o.MaxLost = None,
    units: o.Units = None,
    gate_weights: o.GateWeights = None,
    curve: o.Curve = None,
    run_dir: o.SeenRun = None,
    rate: o.Rate = None,
    segment: o.Segment = None,
    labels: o.Labels = None,
    workers: o.Workers = "0",
    copies: o.Copies = "0",
    vary_by: o.Vary = None,
    noise: o.Noise = None,
    batch_size: o.BatchSize = "32",
    output: o.Write = None,
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Set the threshold, on data that neither training nor the final test uses.

    A bound holds for the data given, unless a guarantee is asked for: --guarantee, or --confidence.
    """
    limits = {"max_difference": max_difference, "max_metric": max_metric, "bound": bound}
    asked: dict[str, Any] = {
        name: None if text is None else number(name.replace("_", "-"), text, "above 0", above=0)
        for name, text in limits.items()
    }
    if light_share is not None:
        asked["light_share"] = number("light-share", light_share, "0 to 1", least=0, most=1)
    if max_lost is not None:
        asked["max_lost"] = number("max-lost", max_lost, "above 0 and below 1", above=0, below=1)
    asked |= {"positive": positive, "units": units, "gate_weights": numbers("gate-weights", gate_weights)}
    if confidence is not None:
        asked["confidence"] = number("confidence", confidence, "above 0 and below 1", above=0, below=1)
    batch, rate_hz, length = whole("batch-size", batch_size, least=1), hertz(rate), seconds(segment)
    with Output(as_json, quiet) as out:
        net = dslified(file)
        from . import calibrate as set_threshold
        from . import report, save
        from .tradeoff import curve_path

        asked["curve"] = None if curve is None else curve_path(curve, force)
        judge = None if metric is None else named_function(metric, "--metric")
        runs = runs_beside(file) if run_dir is None else (run_dir,)
        read = partial(read_data, net, rate=rate_hz, segment=length, out=out, workers=workers)
        samples = _copier(read, out, copies, vary_by, noise)(read(data, labels=labels))
        options: dict[str, Any] = {"guarantee": guarantee, "metric": judge, "training": runs or None, **asked}
        result = set_threshold(net, samples, batch_size=batch, progress=out.progress, **options)
        written = save(net, output or file, force=True)
        out.document = {"file": str(written), "runs": [str(run) for run in runs], **result.to_json()}
        checked = f"held against what {', '.join(map(str, runs))} trained on"
        unknown = f"there is no run folder beside {file}, so nobody knows whether training has seen this data"
        out.show(report.calibration(result), checked if runs else f"note: {unknown} (--run-dir names it)", "")
        out.show(f"wrote {written} ({size_of(written)})", *([] if curve is None else [f"wrote {curve}"]))
        out.next("evaluate", str(written), "--data", "TEST_FOLDER")


def evaluate(
    file: o.File,
    data: o.Data,
    by: o.By = "label",
    metric: o.Metric = None,
    accuracy: o.Accuracy = False,
    positive: o.Positive = None,
    rate: o.Rate = None,
    segment: o.Segment = None,
    labels: o.Labels = None,
    workers: o.Workers = "0",
    batch_size: o.BatchSize = "32",
    seed: o.Seed = "0",
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Hold the routing against full, light, random, an oracle and plain loudness on test data."""
    wanted: dict[str, Any] = {"accuracy": accuracy, "positive": positive, "by": by}
    batch, first = whole("batch-size", batch_size, least=1), whole("seed", seed)
    rate_hz, length = hertz(rate), seconds(segment)
    with Output(as_json, quiet) as out:
        net = dslified(file)
        from . import evaluate as judge
        from . import report

        judged = None if metric is None else named_function(metric, "--metric")
        samples = read_data(net, data, rate_hz, length, out, labels, workers)
        result = judge(net, samples, judged, batch_size=batch, seed=first, progress=out.progress, **wanted)
        out.document = {"file": str(file), **result.to_json()}
        out.show(report.evaluation(result))


def _copier(
    read: Callable[[str], Samples], out: Output, copies: str, vary_by: str | None, noise: str | None, seed: int = 0
) -> Callable[[Samples], Samples]:
    """What puts varied copies beside samples that were just read, as the options ask, and says so."""
    count = whole("copies", copies)
    if not count:
        if vary_by is not None or noise is not None:
            raise OptionError("--vary and --noise say how copies are made, and none are wanted; add --copies 8.")
        return lambda samples: samples
    from . import vary

    noises = None if noise is None else read(noise)
    own = None if vary_by is None else named_function(vary_by, "--vary")

    def varied(samples: Samples) -> Samples:
        found = vary(samples, count, noises=noises, seed=seed, with_=own)
        out.read[-1] = found.report.to_json()
        out.show(*(f"  {note}" for note in found.report.notes[len(samples.report.notes) :]))
        return found

    return varied
