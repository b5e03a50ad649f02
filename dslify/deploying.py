"""The commands for where the network runs: export. cli.py puts them beside the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import options as o
from .console import Output, dslified, read_data, size_of
from .errors import OptionError, StoreError
from .options import hertz, number, seconds, whole

if TYPE_CHECKING:
    from .compact import Compacted
    from .export import Exported


def export(
    file: o.File,
    to: o.ToFormat = None,
    output: o.ExportFile = None,
    split: o.Split = False,
    quantize: o.Quantize = None,
    data: o.FeedData = None,
    batch: o.Batch = "1",
    static: o.Static = False,
    rate: o.Rate = None,
    segment: o.Segment = None,
    labels: o.Labels = None,
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write a file in which only the taken path computes, checked on both routes against the network.

    One ONNX file branches by itself: with several samples in a call it goes light only if all of them may. ExecuTorch
    and LiteRT files hold front, light and full, and your loop calls light or full; --split writes them as three ONNX
    files for two processors, and dslify run shows how.
    """
    count: Any = batch if batch == "any" else whole("batch", batch, least=1)
    rate_hz, length = hertz(rate), seconds(segment)
    if data is None and not (rate is labels is segment is None):
        raise OptionError("--rate, --segment and --labels say how --data is read; give a folder with --data.")
    with Output(as_json, quiet) as out:
        net = dslified(file)
        from . import export as write
        from .export import SUFFIXES, chosen_format

        target = output or file.with_suffix("" if split else SUFFIXES.get(to or "onnx", ".onnx"))
        kind: Any = chosen_format(target, to, split)
        feeds = read_data(net, data, rate_hz, length, out, labels) if data is not None else None
        more: dict[str, Any] = {"quantize": quantize, "data": feeds, "batch": count, "dynamic": not static}
        result = write(net, target, kind, split, force=force, progress=out.progress, **more)
        out.document = result.to_json()
        out.show(*export_lines(result), "", f"wrote {target} ({size_of(target)})" if not split else f"wrote {target}/")
        if kind == "onnx":
            out.next("run", str(target), "--data", "FOLDER")
        else:
            out.next("measure", str(file))


def export_lines(result: Exported) -> list[Any]:
    """What was written, for the terminal: the parts, how far each route is off, what quantizing did, and remarks."""
    from .tables import figure, human, line, plain_table

    lines: list[Any] = []
    if result.parts:
        sizes = plain_table("part", "operators", "parameters", "bytes")
        for part in result.parts:
            sizes.add_row(part.part, str(part.nodes), human(part.parameters), human(part.bytes))
        lines += [sizes, ""]
    off = ", ".join(f"{way} {figure(worst)}" for way, worst in result.errors.items())
    lines.append(line(f"differs from the network by at most (share of the largest value): {off}"))
    for each in result.quantized:
        measured = (
            ""
            if each.quality_db is None
            else f" ({figure(each.quality_db)} dB, {figure(each.latency_ratio)} of the time)"
        )
        lines.append(line(f"{each.part}: {each.reason}{measured}"))
    return lines + [line(f"note: {note}") for note in result.notes]


def run(
    model: o.Delivered,
    data: o.Data,
    threshold: o.Threshold = None,
    wire: o.Wire = None,
    output: o.RoutesFile = None,
    threads: o.Threads = None,
    rate: o.Rate = None,
    segment: o.Segment = None,
    labels: o.Labels = None,
    workers: o.Workers = "0",
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Run a folder of samples through a model as it is delivered, one after the other: which route each takes, and how
    many bytes go from the small processor to the big one.

    MODEL is a .dsl file, an .onnx file of dslify export, or a folder of dslify export --split.
    """
    above = None if threshold is None else number("threshold", threshold, "a number")
    count = 1 if threads is None else whole("threads", threads, least=1)
    rate_hz, length = hertz(rate), seconds(segment)
    if output is not None and (not output.parent.is_dir() or output.is_dir() or (output.exists() and not force)):
        raise OptionError(f"--output {output}: it exists already, or its folder does not; name another, or --force.")
    with Output(as_json, quiet) as out:
        with out.working(f"loading {model}"):
            import torch

            from .routed import delivered, routed, shown, write_rows

            torch.set_num_threads(count)
            opened = delivered(model, above, count, wire)
        samples = read_data(opened, data, rate_hz, length, out, labels, workers)
        found = routed(opened, samples, out.progress)
        out.document = {"model": str(model), "kind": opened.kind, "wire": opened.number or None, **found.to_json()}
        out.show(*shown(found, opened.number))
        if output is not None:
            write_rows(found, output)
            out.document["output"] = str(output)
            out.show(f"wrote {output} ({size_of(output)})")
        share = found.statistics.light_share
        if found.known and 0 < share < 1:
            out.next("measure", str(model) if opened.kind == "dsl" else "FILE.dsl", "--share", f"{share:.2f}")


def measure(
    file: o.File,
    runtime: o.Runtimes = None,
    share: o.StreamShare = "0.8",
    threads: o.MeasuredThreads = "1",
    data: o.MeasuredData = None,
    profile: o.Profile = "45nm-dram",
    measuring: o.MeasuredSeconds = "2",
    static: o.Static = False,
    rate: o.Rate = None,
    segment: o.Segment = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Time the parts, each route, and a stream of samples of which a given share goes light, beside MACs and an
    estimate of energy.

    All in one run with samples taken one at a time, so that ratios hold even on a machine that does other things.
    """
    options: dict[str, Any] = {
        "share": number("share", share, "0 to 1", least=0, most=1),
        "threads": whole("threads", threads, least=1),
        "seconds": number("seconds", measuring, "above 0", above=0),
    }
    rate_hz, length = hertz(rate), seconds(segment)
    with Output(as_json, quiet) as out:
        net = dslified(file)
        from .energy import profile as profiled
        from .latency import measure as time_it
        from .measured import measurement

        samples = None if data is None else read_data(net, data, rate_hz, length, out)
        options |= {"data": samples, "dynamic": not static, "energy": profiled(profile), "progress": out.progress}
        result = time_it(net, runtime, **options)
        out.document = {"file": str(file), **result.to_json()}
        out.show(measurement(result))
        out.next("export", str(file), "--to", "onnx")


def compact(
    file: o.File,
    output: o.NewFile = None,
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Take the channels that the mask has set to zero out of mask, switch, light path, full path and base. The answers
    stay as they are, and the given file too.
    """
    target = output or file.with_name(f"{file.stem}-compact.dsl")
    if target.exists() and not force:
        raise StoreError(f"{target} exists already; give another name with -o, or --force to overwrite it.")
    with Output(as_json, quiet) as out:
        net = dslified(file)
        with out.working("taking the zero channels out and checking the answers"):
            from . import save
            from .compact import compacted

            small, layers = compacted(net)
        written = save(small, target, force=force)
        out.document = {"file": str(written), "layers": [layer.to_json() for layer in layers]}
        for layer in layers:
            out.show(*compact_lines(layer))
        out.show("", f"wrote {written} ({size_of(written)}; {file} has {size_of(file)})")
        out.next("export", str(written))


def compact_lines(layer: Compacted) -> list[Any]:
    """What was taken out at one layer, for the terminal."""
    from .tables import human, line, plain_table

    costs = plain_table("part", "MACs", "MACs now", "share")
    for part, (before, after) in layer.macs.items():
        costs.add_row(part, human(before), human(after), f"{100 * after / before:.1f} %" if before else "")
    base = "the base makes only these" if layer.base else "the base still makes all of them, and these are selected"
    lines = [line(f"layer {layer.layer}: {layer.after} of {layer.before} channels are left; {base}"), costs]
    for path, operators in layer.blocked.items():
        lines += [line(f"{path}: the zeros are put back in front of {blocked}") for blocked in operators]
    return lines
