"""A measurement as tables: times by runtime, the stream against what its parts promise, and energy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from .tables import figure, human, line, percent, plain_table

if TYPE_CHECKING:
    from .energy import Joules
    from .measurement import Energy, Latency, Measurement

SMALL = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"), (1e-12, "p"))


def measurement(result: Measurement) -> RenderableType:
    """Times, mixture, energy, what they mean in a sentence for each runtime, and what to beware of."""
    threads = f"{result.threads} thread{'s' * (result.threads != 1)}"
    fewer = f"{figure(result.macs_ratio)}x fewer MACs" if result.macs_ratio else "no MACs"
    head = (
        f"one sample at a time, {threads}, all from one run; {result.routed}",
        f"light path: {fewer} than full; across the cut: {human(result.between, 'B')} a sample, dense "
        f"({human(result.entering, 'B')} enter the network)",
    )
    verdicts = [line(verdict(each)) for each in result.latencies]
    for each in verdicts:
        each.stylize("bold")
    notes = [f"{each.runtime}: {each.note}" for each in result.latencies if each.note] + list(result.notes)
    counted = [] if result.counted is None else [_counted(result.counted, result.share), ""]
    return Group(
        *map(line, head), "", times(result.latencies), "", mixture(result), "", energy(result.energy, result.share), "",
        *counted, *verdicts, *(line(f"note: {note}") for note in notes),
    )  # fmt: skip


def times(latencies: tuple[Latency, ...]) -> RenderableType:
    """Median and 90th percentile of a sample's time, by runtime: the parts alone, and the network on each route."""
    table = plain_table(
        "time of a sample", *(f"{each.runtime}\n{what}" for each in latencies for what in ("p50", "p90"))
    )
    share = percent(latencies[0].share)
    rows = {
        "front alone": "front",
        "light path alone": "light",
        "full path alone": "full",
        "network, light": "whole_light",
        "network, full": "whole_full",
        f"network, {share} light": "mixed",
    }
    for name, field in rows.items():
        found = [getattr(each, field) for each in latencies]
        table.add_row(name, *(in_unit(value, "s") for each in found for value in (each.p50, each.p90)))
    return table


def mixture(result: Measurement) -> RenderableType:
    """The stream as measured against what the two routes promise; MACs beside the times."""
    table = plain_table(
        "mean of a stream", "always\nfull", "mixed", "computed", "off by", "saved", "full path\n/ light"
    )
    for each in result.latencies:
        table.add_row(
            each.runtime,
            *(in_unit(value, "s") for value in (each.whole_full.mean, each.mixed.mean, each.computed)),
            f"{100 * each.off:+.1f} %",
            percent(each.saved),
            f"{figure(each.ratio)}x",
        )
    macs = [human(value) for value in (result.full.macs, result.mixed.macs)]
    ratio = f"{figure(result.macs_ratio)}x" if result.macs_ratio else "-"
    table.add_row("MACs", *macs, "", "", percent(result.macs_saved), ratio)
    return table


def energy(found: Energy, share: float) -> RenderableType:
    """The estimate by route, and what it rests on."""
    model = found.profile
    table = plain_table("energy of a sample, estimate", "MACs", "memory", "static", "estimate", "of full")
    rows: dict[str, Joules] = {"light": found.light, "full": found.full, f"{percent(share)} light": found.mixed}
    for name, joules in rows.items():
        parts = (joules.macs, joules.bytes, joules.static, joules.total)
        of_full = percent(joules.total / found.full.total) if found.full.total else "-"
        table.add_row(name, *(in_unit(value, "J") for value in parts), of_full)
    rests = (
        f"estimate by profile {model.name}: {figure(model.pj_per_mac)} pJ a MAC, {figure(model.pj_per_byte)} pJ a byte "
        f"(parameters read once, activations written and read once), {figure(model.static_watts)} W static over the "
        f"time in {found.runtime}; no reading. {' '.join(model.source.split())}"
    )
    return Group(table, line(rests))


def _counted(found: dict[str, dict[str, float]], share: float) -> RenderableType:
    table = plain_table("energy of a sample, RAPL", "light", "full", f"{percent(share)} light")
    for runtime, routes in found.items():
        table.add_row(runtime, *(in_unit(routes[name], "J") for name in ("light", "full", "mixed")))
    return Group(table, line("read off the counters of the whole processor, with everything else that runs on it"))


def verdict(found: Latency) -> str:
    """What one runtime's stream means."""

    def less(saved: float) -> str:
        return f"{percent(abs(saved))} {'less' if saved >= 0 else 'more'} time"

    return (
        f"{found.runtime}: at {percent(found.share)} light the network takes {less(found.saved)} than always full, "
        f"measured; computed {less(found.saved_computed)}. The light path alone is {figure(found.ratio)}x faster."
    )


def in_unit(number: float, unit: str) -> str:
    """0.000447 s -> "447 µs": three digits."""
    size, prefix = next(((size, prefix) for size, prefix in SMALL if abs(number) >= size), SMALL[-1])
    return f"{figure(number / size)} {prefix if number else ''}{unit}"
