"""The report in a terminal: by rich where it is installed and somebody looks, as plain text otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TextIO

from ..ledger import title
from .facts import Race, Report, config_name, count, micros, percent, shortened, time_of, times
from .markup import printable


class Table(NamedTuple):
    """A heading and rows of text below column names; columns whose name begins with ">" stand right."""

    heading: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def show(report: Report, out: TextIO) -> None:
    """Prints the report.

    Args:
        report: A run's numbers.
        out: Where. Colours and tables that fit the window go to terminals alone.
    """
    if out.isatty():
        try:
            return _show_rich(report, out)
        except ImportError:
            pass
    print(plain(report), file=out)
    return None


def plain(report: Report) -> str:
    """The report as text of any width."""
    parts = ["\n".join(header(report))]
    parts.append("\n".join(f"  {name:9}  {value}" for name, value in figures(report)))
    parts += [_aligned(table) for table in tables(report)]
    return printable("\n\n".join(parts))


def header(report: Report) -> list[str]:
    """What ran, where, with what, when and how it ended."""
    run = report.run
    if run is None:
        return ["Tuning report: the journal holds no run yet"]
    return [f"Tuning report: {run.device} ({', '.join(place(report))})", " · ".join([*versions(report), *when(report)])]


def place(report: Report) -> list[str]:
    """Facts about the device."""
    run = report.run
    if run is None:
        return []
    bandwidth = [f"{report.roof.bandwidth:g} GB/s"] if report.roof.bandwidth else []
    return [run.arch, f"{run.sms} {'cores' if run.arch == 'cpu' else 'SMs'}", *bandwidth]


def versions(report: Report) -> list[str]:
    """What compiled and ran the kernels."""
    run = report.run
    if run is None:
        return []
    named = {"torch": run.torch, "triton": run.triton, "driver": run.driver}
    return [f"{name} {version}" for name, version in named.items() if version]


def when(report: Report) -> list[str]:
    """The run's start, restarts and end."""
    if report.run is None:
        return []
    started = report.run.started.replace("T", " ").replace("+00:00", " UTC")
    resumed = [f"resumed {report.starts - 1}×"] if report.starts > 1 else []
    return [f"started {started}", *resumed, report.state]


def figures(report: Report) -> Iterator[tuple[str, str]]:
    """The run in a handful of numbers."""
    asked, found = len(report.races), len(report.measured)
    yield "measured", f"{found} of {asked} problems, {percent(report.work)} of the estimated work"
    said = "no problem has both a pick and a time of the untuned default"
    if report.gain is not None:
        ranked = list(report.gains.items())
        (worst, least), (best, most) = ranked[0], ranked[-1]
        said = f"{times(report.gain)} over the untuned default (geometric mean of {len(report.gains)}); "
        said += f"worst {times(least)} (#{worst}), best {times(most)} (#{best})"
    yield "gain", said
    yield "near-ties", f"{count(report.near, 'candidate')} within 2 % of their problem's pick"
    kinds = ", ".join(f"{len(rows)} {kind}" for kind, rows in report.failures.items())
    yield "failures", f"{sum(map(len, report.failures.values()))}" + (f": {kinds}" if kinds else "")
    yield "noisy", f"{count(len(report.noisy), 'row')} whose times spread too wide even when measured again"


def tables(report: Report) -> Iterator[Table]:
    """Problems, failures by kind and noisy rows; what is empty is left out."""
    if report.races:
        columns = (">#", "problem", "pick", ">µs", ">default", ">gain", ">second", ">of roof")
        yield Table("Problems", columns, [_problem(race) for race in report.races])
    if report.failures:
        rows = []
        for kind, failed in report.failures.items():
            race, row = failed[0]
            example = shortened(row.message, 100) or "no message"
            rows.append((kind, str(len(failed)), f"#{race.number} {config_name(row.config, row.route)}: {example}"))
        yield Table("Failures", ("kind", ">rows", "example"), rows)
    if report.noisy:
        yield Table(
            "Noisy rows",
            (">#", "configuration", "stage", ">µs", ">low", ">high"),
            [
                (
                    str(race.number),
                    config_name(row.config, row.route),
                    row.stage,
                    *map(micros, (row.median_us, row.low_us, row.high_us)),
                )
                for race, row in report.noisy
            ],
        )


def _problem(race: Race) -> tuple[str, ...]:
    pick = race.pick
    name = title(race.problem.key)
    if pick is None:
        best = f"none; best so far {micros(time_of(race.timed[0]))} µs" if race.timed else "none"
        return (str(race.number), name, best, "—", "—", "—", "—", "—")
    said = "; ".join(filter(None, ("" if pick.why == "fastest" else pick.why, race.apart)))
    return (
        str(race.number),
        name,
        config_name(pick.config, pick.route) + (f" ({said})" if said else ""),
        micros(pick.median_us),
        micros(pick.default_us),
        times(race.gain),
        micros(pick.second_us),
        percent(race.roof_share),
    )


def _aligned(table: Table) -> str:
    names = [column.lstrip(">") for column in table.columns]
    widths = [max(map(len, cells)) for cells in zip(names, *table.rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        placed = (
            f"{cell:{'>' if column.startswith('>') else '<'}{width}}"
            for cell, column, width in zip(cells, table.columns, widths, strict=True)
        )
        return ("  " + "  ".join(placed)).rstrip()

    return "\n".join([table.heading, line(names), *map(line, table.rows)])


def _show_rich(report: Report, out: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    def cell(text: str, style: str = "") -> Text:
        return Text(printable(text), style=style)

    console = Console(file=out, highlight=False)
    first, *rest = header(report)
    console.print(cell(first, "bold"), *(cell(line, "dim") for line in rest), "", sep="\n")
    summary = RichTable(box=None, show_header=False, pad_edge=False)
    for name, value in figures(report):
        summary.add_row(cell(name, "bold"), cell(value))
    console.print(summary, "")
    for table in tables(report):
        shown = RichTable(title=table.heading, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for column in table.columns:
            shown.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
        for row in table.rows:
            shown.add_row(*map(cell, row))
        console.print(shown)
