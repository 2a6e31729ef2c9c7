"""docs/performance.md, its figures and the README's table, from the result files in benchmarks/results/ alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures, results
from benchmarks.contenders import OURS, TORCHSCALE, UNORDERED
from benchmarks.goals import GOALS, MEASURED, Found, Goal, extra_bytes
from benchmarks.results import Document, best_peer, left_out, median, ratio

ROOT = results.FOLDER.parents[1]
PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
BEGIN, END = "<!-- `python -m benchmarks report` writes from here -->", "<!-- to here -->"
TUNING = "<!-- `python -m benchmarks report` writes what tuning is worth from here -->"
"""Where a page holds them, what stands between is drawn."""
NOTHING = "No result of this measurement is committed yet."
NONE: Mapping[str, Document] = {}


def main(*, check: bool) -> int:
    """Write the page and the figures, or say which ones are out of date.

    Returns:
        The exit code.
    """
    wanted = files(documents(), tuned=documents("tune_standard_*.json"))
    old = [path for path, text in wanted.items() if is_stale(path, text)]
    for path in old:
        print(f"{path.name} is out of date; `python -m benchmarks report` draws it anew" if check else path)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text if isinstance(text := wanted[path], str) else text.svg(), encoding="utf-8")
    return int(check and bool(old))


def documents(pattern: str = "bench_*.json", folder: Path = results.FOLDER) -> dict[str, Document]:
    """Result files of a measurement by file name."""
    return {path.name: results.load(path) for path in sorted(folder.glob(pattern))}


def files(
    found: Mapping[str, Document], page: Path = PAGE, readme: Path = README, *, tuned: Mapping[str, Document] = NONE
) -> dict[Path, str | figures.Picture]:
    """The page, its figures, and the README where it has places for the tables, as they should be."""
    pictures = {
        page.parent / "figures" / _figure(name, picture): picture
        for name, document in found.items()
        for picture in figures.pictures(document)
    }
    sections = [_section(name, document) for name, document in found.items()] or [NOTHING]
    texts = {page: _between_marks(page.read_text(encoding="utf-8"), "\n\n".join(sections))}
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    places = {mark: table for mark, table in ((BEGIN, summary(found)), (TUNING, worth(tuned))) if mark in text}
    for mark, table in places.items():
        texts[readme] = text = _between_marks(text, table or NOTHING, mark)
    return {**texts, **pictures}


def _between_marks(page: str, text: str, begin: str = BEGIN) -> str:
    before, _, rest = page.partition(begin)
    return "\n\n".join([before.rstrip(), begin, text, END]) + rest.partition(END)[2]


def worth(tuned: Mapping[str, Document]) -> str:
    """What tuning gained over the untuned defaults on every GPU side by side: by model, then in all."""
    problems = [document["problems"] for document in tuned.values()]
    names = dict.fromkeys(problem["workload"] for found in problems for problem in found)
    lines = []
    for name in (*names, None):
        cells = []
        for found in problems:
            gains = [row["gain"] for row in found if name in (row["workload"], None) and row["gain"] is not None]
            cells += [str(len(gains)), *map(_number, (_geometric_mean(gains), max(gains, default=math.nan)))]
        lines.append(["in all" if name is None else f"`{name}`", *cells])
    gpus = [document["run"]["device"] for document in tuned.values()]
    head = ["", *(cell for gpu in gpus for cell in (f"{gpu}, launches", "default ÷ pick", "at most"))]
    return _table(head, lines)


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def summary(found: Mapping[str, Document]) -> str:
    """Whole operations on every GPU side by side: ours, the best peer, the ratio."""
    cases = dict.fromkeys(name for document in found.values() for name, _ in _of_level(document, "operations"))
    lines = []
    for name in cases:
        for measurement in ("forward", "both"):
            cells = [cell for document in found.values() for cell in _beside_best(document, name, measurement)]
            if any(cells):
                lines.append([f"`{name.removeprefix('op-')}` {MEASURED[measurement]}", *cells])
    gpus = [f"{_gpu(document)}, ms" for document in found.values()]
    head = ["", *(cell for gpu in gpus for cell in (gpu, "best peer, ms", "ratio"))]
    return _table(head, lines)


def _beside_best(document: Document, name: str, measurement: str) -> list[str]:
    case = document["cases"].get(name, {"rows": {}})
    mine, peer = median(case["rows"].get(OURS, {}), measurement), best_peer(case, measurement)
    without = ", of those timed" if left_out(case) else ""
    return [
        _number(mine),
        "" if peer is None else f"{_number(peer[1])} ({_short(peer[0])}{without})",
        _number(ratio(case, measurement)),
    ]


def _gpu(document: Document) -> str:
    found = document["runs"][-1]["environment"]
    return str(found.get("gpu", found["cpu"]))


def is_stale(path: Path, wanted: str | figures.Picture) -> bool:
    """Whether a file is missing or shows something else."""
    if not path.is_file():
        return True
    text = path.read_text(encoding="utf-8")
    return text != wanted if isinstance(wanted, str) else wanted.mark not in text


def _figure(name: str, picture: figures.Picture) -> str:
    return f"{Path(name).stem}_{picture.name}.svg"


# ---- The section of a GPU --------------------------------------------------------------------------------------------


def _section(name: str, document: Document) -> str:
    runs = document["runs"]
    shown = {
        picture.name: f"![{picture.name}](figures/{_figure(name, picture)})" for picture in figures.pictures(document)
    }
    parts = [
        f"## {_gpu(document)}",
        "\n".join(_run(name, run) for run in runs),
        _titled("Goals", _goals(document)),
        _titled("Whole operations", [shown.get("operations", ""), _operations(document)]),
        _titled("One branch", [shown.get("kernels", ""), _kernels(document)]),
        _titled("Orders", _orders(document)),
        _titled("Scale", [shown.get("scale", ""), _scale(document)]),
        _titled("First calls", _first_calls(document)),
        _titled("Who did not take part", _failed(document)),
    ]
    return "\n\n".join(part for part in parts if part)


def _titled(title: str, texts: str | Sequence[str]) -> str:
    told = [text for text in ([texts] if isinstance(texts, str) else texts) if text]
    return "\n\n".join([f"### {title}", *told]) if told else ""


def _run(name: str, run: Mapping[str, Any]) -> str:
    found, ceilings = run["environment"], run["ceilings"]
    commands = ", ".join(f"`{command}`" for command in run["commands"])
    left = len(run.get("left_out", []))
    return (
        f"- [Result](../benchmarks/results/{name}) of commit {found['commit']}: torch {found['torch']}, triton "
        f"{found['triton']}, cuDNN {found.get('cudnn')}, driver {found.get('driver')}; {commands}, at most "
        f"{run['settings']['rounds']} rounds. The fastest matrix product {ceilings['matmul_tflops']:.0f} TFLOP/s, copy "
        f"{ceilings['copy_tb_s']:.2f} TB/s. The zero rows of dilated branches are {results.zero_rows(run)}."
        + (f" {left} cases were left to another run." if left else "")
    )


def _goals(document: Document) -> str:
    lines = [line for goal in GOALS if (found := list(goal.find(document))) for line in [_goal(goal, found, document)]]
    return _table(("", "worst case", "worst", "middle", "floor", "goal", ""), lines)


def _goal(goal: Goal, found: Sequence[Found], document: Document) -> list[str]:
    worst = min(found, key=goal.margin)
    middle = statistics.geometric_mean(each.value for each in found)
    if all(goal.holds(each.value, each.goal) for each in found):
        verdict = "reached"
    else:
        verdict = "above the floor" if goal.holds(worst.value, worst.floor) else "**below the floor**"
    if "best peer" in goal.name and any(left_out(document["cases"][each.case]) for each in found):
        verdict += "; of the peers that were timed"
    numbers = [f"{number:.3g}{goal.unit}" for number in (worst.value, middle, worst.floor, worst.goal)]
    return [goal.name, f"`{worst.case}`", *numbers, verdict]


def _operations(document: Document) -> str:
    lines = []
    for name, case in _of_level(document, "operations"):
        for measurement in ("forward", "both"):
            mine, peer = median(case["rows"].get(OURS, {}), measurement), best_peer(case, measurement)
            eager = median(case["rows"].get(TORCHSCALE, {}), measurement)
            without = f"; {len(left_out(case))} left out" if left_out(case) else ""
            memory = [] if peer is None else [extra_bytes(case, who) for who in (OURS, peer[0])]
            lines.append(
                [
                    f"`{name}` {MEASURED[measurement]}",
                    _ms(case, OURS, measurement),
                    "" if peer is None else f"{peer[1]:.3f} ({peer[0]}{without})",
                    _number(ratio(case, measurement)),
                    _number(eager / mine if eager and mine else None),
                    _share(case, measurement, mine),
                    " of ".join(f"{extra / 2**20:.0f}" for extra in memory if extra is not None)
                    if measurement == "both"
                    else "",
                ]
            )
    head = ("", "ours, ms", "best peer, ms", "ratio", "torchscale's way", "of the limit", "MiB of the peer's")
    return _table(head, lines)


def _kernels(document: Document) -> str:
    lines = []
    for name, case in _of_level(document, "kernels"):
        if case["problem"]["order"] != "none":
            continue
        cells = [f"`{name.removeprefix('kernel-')}`"]
        for measurement, work in (("forward", 1.0), ("backward", 2.5)):
            mine, peer = median(case["rows"].get(OURS, {}), measurement), best_peer(case, measurement)
            cells += [
                "" if mine is None else f"{work * case['gflop'] / mine:.0f}",
                "" if peer is None else f"{work * case['gflop'] / peer[1]:.0f} ({_short(peer[0])})",
                _number(ratio(case, measurement)),
                _share(case, measurement, mine),
            ]
        lines.append(cells)
    head = (
        "useful TFLOP/s",
        "forward",
        "best peer",
        "ratio",
        "of the limit",
        "backward",
        "best peer",
        "ratio",
        "of the limit",
    )
    return _table(head, sorted(lines, key=lambda cells: _sizes(cells[0])))


def _sizes(name: str) -> tuple[Any, ...]:
    """n64-d48-r1-causal -> sorted by head_dim, causality, rate and rows."""
    words = name.strip("`").split("-")
    rows, head_dim, rate = (int(word[1:]) for word in words[:3])
    return head_dim, len(words), rate, rows


def _orders(document: Document) -> str:
    lines = []
    for name, case in _of_level(document, "kernels"):
        for measurement in ("forward", "backward"):
            mine, without = (median(case["rows"].get(who, {}), measurement) for who in (OURS, UNORDERED))
            if mine and without:
                lines.append([f"`{name}` {measurement}", f"{mine:.3f}", f"{without:.3f}", f"{without / mine:.2f}"])
    return _table(("", "in the order, ms", "without, ms", "share of its speed"), lines)


def _scale(document: Document) -> str:
    cells: dict[tuple[str, int], list[str]] = {}
    for _, case in _of_level(document, "scale"):
        key = case["workload"], case["problem"]["length"]
        row = case["rows"].get(OURS, {})
        cells[key] = [f"{key[0]}, {key[1]}"]
        for measurement in ("forward", "both"):
            time, peak = median(row, measurement), row.get("peak_bytes", {}).get(measurement)
            each = None if time is None else 1e6 * time / key[1]
            cells[key] += [_number(time, 4), _number(each, 3), "" if peak is None else f"{peak / 2**20:.0f}"]
        cells[key] += [_number(median(case["rows"].get(figures.DENSE, {}), "both"), 4)]
    head = ("tokens", "forward, ms", "ns a token", "MiB", "with backward, ms", "ns a token", "MiB", "dense cuDNN, ms")
    return _table(head, [cells[key] for key in sorted(cells)])


def _first_calls(document: Document) -> str:
    lines = []
    for name, case in _of_level(document, "latency"):
        for who, row in case["rows"].items():
            if "failed" not in row:
                states = [
                    row["cold"]["forward_ms"],
                    row["warm"]["forward_ms"],
                    row["cold"]["both_ms"],
                    row["warm"]["both_ms"],
                ]
                lines.append([f"`{name}`", who, *(f"{time / 1e3:.2f}" for time in states)])
    head = ("", "", "forward, cold, s", "warm, s", "then with backward, cold, s", "warm, s")
    return _table(head, lines)


def _failed(document: Document) -> str:
    """Everybody's failures: one line for all cases with the same reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, case in document["cases"].items():
        for who, row in case["rows"].items():
            if "failed" in row:
                reasons.setdefault((who, row["failed"]), []).append(name)
    lines = [
        [who, reason.replace("|", "\\|"), f"`{cases[0]}`" + (f" and {len(cases) - 1} more" if len(cases) > 1 else "")]
        for (who, reason), cases in sorted(reasons.items())
    ]
    return _table(("", "why", "where"), lines)


# ---- Cells -----------------------------------------------------------------------------------------------------------


def _of_level(document: Document, level: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return ((name, case) for name, case in document["cases"].items() if case["level"] == level)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *rows]) if rows else ""


def _ms(case: Mapping[str, Any], who: str, measurement: str) -> str:
    row = case["rows"].get(who, {})
    if median(row, measurement) is None:
        return ""
    middle, low, high = row[f"{measurement}_ms"]
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}g}"


def _share(case: Mapping[str, Any], measurement: str, time: float | None) -> str:
    return "" if time is None else f"{case['limit_ms'][measurement] / time:.0%}"


def _short(name: str) -> str:
    return name.replace("FlashAttention-", "FA")
