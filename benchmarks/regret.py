"""`python -m benchmarks.regret`: how much time is lost on problems that nobody tuned, on a GPU, in about seven minutes.

Problems are drawn with a seed: a third between those of the database (of a kind that was tuned, with rows between the
tuned ones), a third beyond them (fewer rows, or more), a third across (of a kind that was not tuned: another head
dimension, dtype, order or causality, or several branches in one pass). For each the plan says what would run, and the
tuner searches everything there is, steps around the best included, and times the five fastest once more in turn with
what would run. Regret is the time of what would run over the best time of these: 1 where nothing is lost. The database
is read and never written. Entries whose kernel text has changed since do not count as tuned.

    python -m benchmarks.regret                 # 60 problems: benchmarks/results/regret_<gpu>.json
    python -m benchmarks.regret --count 90 --seed 7 --journal regret.jsonl

When the budget is spent nothing new is begun: the result tells how many of the problems were measured. With --journal
the same command goes on with those that were not.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import retimed
from benchmarks.retimed import failed, median, timed, told
from dilated_attention_pytorch import database, generated
from dilated_attention_pytorch import device as devices
from dilated_attention_pytorch.config import OPS, Problem, ProblemKey
from dilated_attention_pytorch.database import Database
from dilated_attention_pytorch.device import Device, Toolchain
from dilated_attention_pytorch.errors import ArgumentError
from dilated_attention_pytorch.runtime.plan import Choice, plan
from dilated_attention_pytorch.runtime.variants import query_rows
from dilated_attention_pytorch.tuning import ledger, machine, problems, progress
from dilated_attention_pytorch.tuning.journal import Journal
from dilated_attention_pytorch.tuning.problems import Task
from dilated_attention_pytorch.tuning.search import candidate_of
from dilated_attention_pytorch.tuning.space import KERNEL, Candidate
from dilated_attention_pytorch.tuning.tune import Progress, Settings, tune
from dilated_attention_pytorch.variant import Variant
from dilated_attention_pytorch.workloads import near_square

COUNT = 60
FASTEST = 5
"""Timed again beside what would run."""
RACED = ("race", "step")
MEDIAN, WORST = 1.02, 1.10
"""What the median and the worst regret should not exceed."""

WHERE = ("between", "beyond", "across")
HEAD_DIMS = (48, 64, 96, 128)
DTYPES = ("bf16", "fp16")
LEAST_ROWS, MOST_ROWS = 32, 4096
SHORTEST_US, LONGEST_US = 20.0, 700.0
"""Of a launch, by a crude estimate: a shorter one cannot be told from its neighbours, a longer one takes too long."""
MOST_ELEMENTS = 1 << 26
"""Of q."""
MOST_SCORES = 1 << 28
"""That the oracle holds in float64 for two segments."""
DRAWS = 10_000


@dataclass(frozen=True)
class Drawn:
    """A launch that was not tuned.

    Attributes:
        where: "between", "beyond" or "across".
        task: The launch.
        choice: What the plan runs, from which rung, and why.
    """

    where: str
    task: Task
    choice: Choice


def main() -> int:
    """Draw, measure, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT, help=f"problems (default {COUNT})")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    retimed.add_options(parser, budget=540.0)
    arguments = parser.parse_args()
    device = devices.current()
    if device is None:
        print("this measurement needs a GPU")
        return 2
    drawn = draw(arguments.count, arguments.seed, device, Toolchain.current(), database.load())
    with tempfile.TemporaryDirectory() as folder:
        found = measure(drawn, device, retimed.settings(arguments, folder), progress.shown())
    what = "time of what the plan runs over the best of an exhaustive search, on problems that were not tuned"
    told_of = {"what": what, "database": database.load().digest(), "seed": arguments.seed}
    document = retimed.write("regret", arguments, device, {**told_of, **found})
    show(document)
    return 0 if found["measured"] == found["asked"] and not any(row["failure"] for row in found["rows"]) else 1


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def draw(count: int, seed: int, device: Device, toolchain: Toolchain, found: Database) -> list[Drawn]:
    """Launches whose keys are not in a database, in turn from each place and of each op; the same for the same seed.

    All gradients in one launch are not drawn: what is tuned of them holds for segments of the same rows alone.

    Args:
        count: How many.
        seed: Of the draw.
        device: What they are planned for.
        toolchain: What compiles them.
        found: The database, which the plan asks.

    Raises:
        ArgumentError: The database has nothing for this architecture, or too little to draw so many.
    """
    chance = random.Random(seed)
    names = found.devices(device.arch)
    tuned = {key for name in names for key in retimed.usable(found, device, name, toolchain) if key.dtype in DTYPES}
    drawn: list[Drawn] = []
    for where, op in itertools.islice(itertools.cycle(itertools.product(WHERE, OPS)), count):
        taken = tuned | {earlier.task.key for earlier in drawn}
        for _ in range(DRAWS):
            task = _task(chance, where, op, tuned, device)
            if task is None or task.key in taken:
                continue
            choices = plan(task.problem, device, "triton", toolchain=toolchain, committed=found).of(op)
            if len(choices) == 1:  # else a call runs others in its place, which are drawn by themselves
                break
        else:
            raise ArgumentError(f"no {op} {where} what is tuned for {device.arch} was found; tune more, or draw fewer")
        drawn.append(Drawn(where, task, choices[0]))
    return drawn


def _task(chance: random.Random, where: str, op: str, tuned: set[ProblemKey], device: Device) -> Task | None:
    """One launch, or None where the draw did not come to one of this place and of a size to be measured."""
    kinds: dict[ProblemKey, list[int]] = {}
    for key in sorted(tuned):
        if key.op == op:
            kinds.setdefault(_kind(key), []).append(key.branches[0][0])
    if where == "across":
        kind = _any_kind(chance, op)
        rows = _between(chance, LEAST_ROWS, MOST_ROWS)
    else:
        alone = {kind: rows for kind, rows in kinds.items() if len(kind.branches) == 1}
        spanned = {kind: rows for kind, rows in alone.items() if where == "beyond" or min(rows) < max(rows)}
        if not spanned:
            return None
        kind = chance.choice(list(spanned))
        fewest, most = min(spanned[kind]), max(spanned[kind])
        ranges = {"between": [(fewest, most)], "beyond": [(fewest / 4, fewest / 1.3), (1.3 * most, 4 * most)]}
        rows = _between(chance, *chance.choice(ranges[where]))
    if not LEAST_ROWS <= rows <= MOST_ROWS:
        return None
    problem = _chain(chance, kind) if where == "across" and chance.random() < 0.25 else _problem(chance, kind, rows)
    tasks = (task for task in problems.of_calls([(where, problem)], device) if task.op == op)
    task = next((task for task in tasks if task.problem == problem), None)
    if task is None or not _can_be_measured(task, device):
        return None
    found = _kind(task.key)
    fits = found not in kinds if where == "across" else found == kind
    return task if fits else None


def _kind(key: ProblemKey) -> ProblemKey:
    """What two keys share whose measurements may speak for each other."""
    return replace(key, branches=((0, 0),) * len(key.branches), grid=1)


def _any_kind(chance: random.Random, op: str) -> ProblemKey:
    return ProblemKey(
        op=op,
        dtype=chance.choice(DTYPES),
        head_dim=chance.choice(HEAD_DIMS),
        branches=((0, 0),),
        queries=chance.choice(("dilated", "all")),
        order=chance.choice(("none", "snake")),
        causal=chance.choice((False, True)),
        flags=chance.choice(((), ("full",))),
        grid=1,
    )


def _problem(chance: random.Random, kind: ProblemKey, rows: int) -> Problem:
    """A call of a kind with so many kept rows, and a last segment that is cut short in every second one."""
    rate = chance.choice((1, 2, 3, 4, 6, 8, 12, 16))
    segment = rows * rate - chance.choice((0, rate // 2))
    segments = 1 if "full" in kind.flags else chance.randint(2, 16)
    tail = chance.randrange(segment) if segments > 1 and chance.random() < 0.5 else 0
    length = segments * segment - tail
    return replace(
        _call(chance, kind, length, ((segment, rate),)),
        queries=kind.queries,
        order=kind.order,
        row_width=near_square(length) if kind.order == "snake" else 0,
        mask="mask" in kind.flags,
        dropout="dropout" in kind.flags,
        padding="zeros" if "zeros" in kind.flags else "none",
    )


def _chain(chance: random.Random, kind: ProblemKey) -> Problem:
    """A call of several branches that one of the rendered texts computes in one pass, of any length."""
    chains = sorted({Variant.from_name(name).levels for name in generated.names() - {"delta"}} - {()})
    branches = chance.choice(chains)
    return _call(chance, kind, chance.randint(branches[0][0], 2 * branches[-1][0]), branches)


def _call(chance: random.Random, kind: ProblemKey, length: int, branches: tuple[tuple[int, int], ...]) -> Problem:
    heads = chance.choice((4, 8, 12, 16))
    return Problem(
        dtype=kind.dtype,
        batch=chance.choice((1, 2, 4)),
        length=length,
        heads=heads,
        kv_heads=heads,
        head_dim=kind.head_dim,
        branches=branches,
        head_offset=chance.choice(("cyclic", "blocked", "zero")),
        causal=kind.causal,
    )


def _between(chance: random.Random, low: float, high: float) -> int:
    """An integer, each octave as likely."""
    return round(math.exp(chance.uniform(math.log(low), math.log(high))))


def _can_be_measured(task: Task, device: Device) -> bool:
    problem = task.problem
    elements = problem.batch * problem.length * problem.heads * problem.head_dim
    pairs = (query_rows(problem, branch) * problem.rows(branch) for branch in range(len(problem.branches)))
    scores = 2 * problem.heads * sum(pairs)
    in_time = SHORTEST_US <= problems.crude_us(task, device) <= LONGEST_US
    return in_time and elements <= MOST_ELEMENTS and scores <= MOST_SCORES


# ---- Measuring -------------------------------------------------------------------------------------------------------


def measure(drawn: Sequence[Drawn], device: Device, settings: Settings, shown: Progress) -> dict[str, Any]:
    """Search each launch, what would run among the candidates, and compare in the finals.

    Args:
        drawn: What was drawn.
        device: What measures.
        settings: Of the searches; how many go to the finals, and against whom, is settled here.
        shown: Who is told how far it is.
    """
    routes = {name: route for name, route in settings.routes.items() if name == KERNEL}
    dispatched = {one.task.key: Candidate.of(one.choice.config) for one in drawn}
    journal = tune(
        [one.task for one in drawn],
        device,
        machine.run_row(device, "benchmarks.regret"),
        replace(settings, finalists=FASTEST, routes=routes),
        incumbents=dispatched,
        progress=shown,
    )
    rows = [row for one in drawn for row in _rows(one, journal)]
    regrets = sorted(row["regret"] for row in rows if row["regret"] is not None)
    return {
        "asked": len(drawn),
        "measured": len(regrets),
        "seconds": journal.ends[-1].seconds,
        "median": statistics.median(regrets) if regrets else None,
        "worst": regrets[-1] if regrets else None,
        "rows": rows,
    }


def _rows(one: Drawn, journal: Journal) -> Iterator[dict[str, Any]]:
    """What came of a launch; nothing where its search had no finals for want of time."""
    key, ran = one.task.key, Candidate.of(one.choice.config)
    finals = {candidate: row for candidate, row in timed(journal, key).items() if row.stage == "finals"}
    failure = failed(journal, key, [ran])
    if not finals and not failure:
        return
    best = min(finals.values(), key=median, default=None)
    [untuned] = [row.default or {} for row in journal.problems if row.key == key]
    default = Candidate(KERNEL, tuple(untuned.items()))
    yield {
        "launch": ledger.title(key),
        "where": one.where,
        "problem": asdict(one.task.problem),
        "op": one.task.op,
        "rung": one.choice.rung,
        "why": one.choice.why,
        "text": one.choice.variant.name,
        "dispatched": told(finals.get(ran), ran),
        "best": None if best is None else told(best, candidate_of(best)),
        "untuned": told(finals.get(default), default),
        "regret": median(finals[ran]) / median(best) if best is not None and ran in finals else None,
        "finals": [told(row, candidate) for candidate, row in finals.items()],
        "raced": sum(
            row.key == key and row.stage in ("race", "step") and row.status == "ok" for row in journal.measurements
        ),
        "failure": failure,
    }


def show(document: dict[str, Any]) -> None:
    """The table that a person reads."""
    table = Table(title=f"{document['measured']} of {document['asked']} problems in {document['seconds']:.0f} s")
    for column, justify in (("launch", "left"), ("", "left"), ("rung", "left"), ("runs", "left"), ("us", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for column, justify in (("best", "left"), ("us", "right"), ("untuned us", "right"), ("regret", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in retimed.slowest_first(document["rows"], "regret"):
        best = row["best"] or {"config": "-", "us": None}
        regret = row["failure"] or "-" if row["regret"] is None else f"{row['regret']:.3f}"
        ran = row["dispatched"]
        times = [retimed.us(one) for one in (ran, best, row["untuned"])]
        table.add_row(
            row["launch"], row["where"], row["rung"], ran["config"], times[0], best["config"], *times[1:], regret
        )
    console = Console(width=170)
    console.print(table)
    if document["median"] is not None:
        found = f"median {document['median']:.3f} (at most {MEDIAN}), worst {document['worst']:.3f} (at most {WORST})"
        console.print(f"regret: {found}")


if __name__ == "__main__":
    sys.exit(main())
