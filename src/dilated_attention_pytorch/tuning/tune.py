"""A tuning run: searches side by side, compiled for by a pool of processes and measured by one process a GPU.

Every row is in the journal before it is acted on. A run that was killed goes on from there: its searches are asked the
same questions again, and those that the journal answers are not measured.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from .. import database, generated
from ..config import BACKWARD, Problem, ProblemKey
from ..database import Resources
from ..device import CPU, Device
from ..errors import DatabaseError, DilatedAttentionError, UnsupportedError
from ..runtime.options import Options
from ..runtime.plan import launches_of
from ..runtime.variants import key_of, may_give_all_gradients, stood_in_for, text_for
from . import folding, journal, space
from .journal import End, Journal, Measurement, Pick, ProblemRow, Run, Writer
from .measure import Answer, Checked, CheckJob, Job, Timed, TimeJob, bench
from .problems import Task, every_branch, launched, parts
from .routes import ROUTES, Route
from .scenes import ragged as ragged_problem
from .screening import Compilation, Compiled, Pool, Setup, compiler, cores
from .search import FINALISTS, STEPS, Request, Search, Verdict, candidate_of, search
from .space import APART, KERNEL, TORCH, Candidate, Launched
from .worker import Lost, NoStart, Raised, Worker, wait_for_any

CANDIDATE_S = 60.0
"""Seconds that a check or a timing may take; one that hangs costs as much."""
RACE_US = 15e3
FINALS_US = 60e3
"""Microseconds that a candidate runs in the race, and in the finals."""
SAVE_S = 10.0
"""Between two savings of picks: the database is read and written whole, while the GPU waits for the next candidate."""
STARTS = 3
"""Starts of a measuring process that may fail one after the other before its GPU is given up."""


class DeviceLost(DilatedAttentionError, RuntimeError):
    """No GPU is left to measure on; the journal holds what was measured."""


@dataclass(frozen=True)
class Settings:
    """How a run goes.

    Attributes:
        journal: Its file; one that exists is gone on with.
        root: The database that it folds into; None folds into none.
        gpus: Torch devices that measure, one process each.
        budget_s: Seconds after which nothing new is begun.
        limit: Candidates a task at most, the most promising; None is all.
        finalists: Of those that raced, the default and the incumbent apart.
        steps: Candidates that the step around the best adds at most.
        processes: That compile; None is one a core that no GPU's process needs.
        candidate_s: Seconds that a check or a timing may take.
        race_us: Microseconds that a candidate runs in the race, and
        finals_us: in the finals.
        routes: Ways to run a task; a rival that has none takes no part. Tests put stand-ins.
        measurer: What measures, in a process for each of `gpus`.
        compiler: What compiles, in processes of its own; None compiles nothing: the interpreter, a CPU.
    """

    journal: Path
    root: Path | None
    gpus: tuple[str, ...] = ("cuda:0",)
    budget_s: float = float("inf")
    limit: int | None = None
    finalists: int = FINALISTS
    steps: int = STEPS
    processes: int | None = None
    candidate_s: float = CANDIDATE_S
    race_us: float = RACE_US
    finals_us: float = FINALS_US
    routes: Mapping[str, Route] = field(default_factory=lambda: ROUTES)
    measurer: Callable[[str, Device, Mapping[str, Route]], Callable[[Job], Answer]] = bench
    compiler: Setup | None = compiler


class Progress:
    """Who is told how far a run is; this one is silent."""

    def begin(self, tasks: int, done: int) -> None:
        """So many tasks, of which so many were done by earlier starts."""

    def note(self, text: str) -> None:
        """What happens now."""

    def picked(self, task: Task, pick: Pick | None) -> None:
        """A task is done; without a pick where no candidate survived."""

    def end(self) -> None:
        """The run is over."""


def tune(
    tasks: Sequence[Task],
    device: Device,
    run: Run,
    settings: Settings,
    *,
    ranked: Mapping[ProblemKey, Sequence[Candidate]] | None = None,
    incumbents: Mapping[ProblemKey, Candidate] | None = None,
    progress: Progress | None = None,
) -> Journal:
    """Search every task's winner, the first ones first.

    Args:
        tasks: By weight.
        device: What kernels are compiled for and entries are saved under.
        run: The journal's first line.
        settings: See there.
        ranked: Candidates by key, from a screening elsewhere, in place of the space's.
        incumbents: By key, in place of the database's.
        progress: Who is told.

    Returns:
        The journal, with what earlier starts measured.

    Raises:
        DatabaseError: The database cannot be written to, or the journal is another machine's, or another run writes it.
        DeviceLost: No GPU is left.
    """
    if settings.root is not None:
        with database.locked(settings.root):
            pass  # better told now than after an hour
    with Writer(settings.journal) as writer:
        known = journal.read(settings.journal) if settings.journal.is_file() else Journal()
        _refuse_other(known, run, settings.journal)
        given = ranked or {}, incumbents or {}
        return _Tuning(tasks, device, run, settings, *given, progress or Progress(), known, writer).go()


def _refuse_other(known: Journal, run: Run, path: Path) -> None:
    for name in ("device", "arch", "triton", "torch", "driver", "kernels"):
        for earlier in known.runs[:1]:
            before, now = getattr(earlier, name), getattr(run, name)
            if before != now:
                raise DatabaseError(f"{path} was measured with {name} {before}, and now it is {now}: begin a new run")


@dataclass(eq=False)
class _Active:
    """A search under way.

    Attributes:
        task: Its task.
        default: The untuned default.
        search: The generator.
        earlier: Rows of an earlier start by stage and candidate, oldest first.
        request: What it waits for.
        answers: Rows of the request's candidates, by place.
        compiling: Compilations of the request that are under way.
        wants: Candidates, by place, that a measuring process has to take.
        worker: The measuring process that has begun with it: its tensors are there.
        resources: What compiled kernels take, by candidate.
        checked: Error and tolerance of the worst check, by candidate.
        raced: Candidates that were timed.
        singly: Candidates are timed one by one: timed in turn, one of them ended the process.
    """

    task: Task
    default: Candidate
    search: Search
    earlier: dict[tuple[str, Candidate], deque[Measurement]]
    request: Request | None = None
    answers: dict[int, Measurement] = field(default_factory=dict)
    compiling: int = 0
    wants: list[int] = field(default_factory=list)
    worker: Worker | None = None
    resources: dict[Candidate, Resources | None] = field(default_factory=dict)
    checked: dict[Candidate, tuple[float, float]] = field(default_factory=dict)
    raced: int = 0
    singly: bool = False


class _Tuning:
    def __init__(
        self,
        tasks: Sequence[Task],
        device: Device,
        run: Run,
        settings: Settings,
        ranked: Mapping[ProblemKey, Sequence[Candidate]],
        incumbents: Mapping[ProblemKey, Candidate],
        progress: Progress,
        known: Journal,
        writer: Writer,
    ) -> None:
        self._device, self._run, self._settings = device, run, settings
        self._ranked, self._given = ranked, incumbents
        self._progress, self._journal, self._writer = progress, known, writer
        self._begun = time.monotonic()
        free = max(cores() - len(settings.gpus), 1)
        self._pool = Pool(device, settings.processes or free, settings.compiler or compiler)
        self._workers = [Worker(settings.measurer, gpu, device, settings.routes) for gpu in settings.gpus]
        self._measuring: dict[Worker, tuple[_Active, list[int]]] = {}
        self._failed_starts: dict[Worker, int] = defaultdict(int)
        self._active: list[_Active] = []
        self._unsaved, self._saved = list(known.picks), -float("inf")  # a start that was killed may have saved less
        picked = {pick.key for pick in known.picks}
        self._tasks = tasks
        self._waiting = deque(task for task in tasks if task.key not in picked)
        self._texts = generated.names()
        self._route = TORCH if device.arch == CPU else KERNEL  # what can win

    def go(self) -> Journal:
        """Until every task is done, or the budget is spent."""
        self._write(self._run)
        self._progress.begin(len(self._tasks), len(self._tasks) - len(self._waiting))
        finished = False
        try:
            self._save()
            if self._waiting:
                for worker in self._workers:
                    worker.start()  # to find its GPU while the first candidates are compiled
            finished = self._search_all()
        except (DeviceLost, UnsupportedError):
            self._write(End(self._seconds, finished))
            raise
        finally:
            self._progress.end()
            self._pool.stop()
            for worker in self._workers:
                worker.stop()
            self._save()
        self._write(End(self._seconds, finished))
        return self._journal

    @property
    def _seconds(self) -> float:
        return round(time.monotonic() - self._begun, 1)

    @property
    def _hurry(self) -> bool:
        return time.monotonic() - self._begun > self._settings.budget_s

    def _search_all(self) -> bool:
        """Whether no task had to be given up for want of time."""
        complete = True
        while self._waiting or self._active:
            if self._hurry:
                complete &= not self._drop_unraced()
            self._start_searches()
            self._take_compiled()
            self._take_measured()
            self._give_work()
            wait_for_any([*self._workers, *self._pool.workers], 0.5)
        return complete

    # ---- Searches ----------------------------------------------------------------------------------------------------

    def _start_searches(self) -> None:
        """As many as keep the compiling processes busy, and two for each GPU at least."""
        while self._waiting and not self._hurry:
            ready = sum(not active.compiling for active in self._active)
            if ready >= 2 * len(self._workers) or self._pool.backlog >= 2 * len(self._pool.workers):
                return
            task = next((task for task in self._waiting if not self._awaits_parts(task)), None)
            if task is None:
                return
            self._waiting.remove(task)
            self._start(task)

    def _awaits_parts(self, task: Task) -> bool:
        """What it is compared with is still being tuned."""
        keys = parts(task)
        unfinished = (*self._waiting, *(active.task for active in self._active)) if keys else ()
        return any(other.key in keys for other in unfinished)

    def _start(self, task: Task) -> None:
        everything = space.space(task, self._device)
        candidates = list(dict.fromkeys((everything[0], *self._ranked.get(task.key, everything[1:]))))
        incumbent = self._incumbent(task)
        steered = search(
            candidates[: self._settings.limit],
            incumbent,
            apart=self._apart(task),
            rivals=[rival for rival in space.rivals(task, self._device) if rival.route in self._settings.routes],
            finalists=self._settings.finalists,
            steps=self._settings.steps,
            neighbours=lambda candidate: space.neighbours(task, self._device, candidate),
            tailed=partial(takes_tails, task),
            hurry=lambda: self._hurry,
        )
        earlier: dict[tuple[str, Candidate], deque[Measurement]] = defaultdict(deque)
        for row in self._journal.measurements:
            if row.key == task.key:
                earlier[row.stage, Candidate(row.route, tuple(row.config.items()))].append(row)
        active = _Active(task, candidates[0], steered, earlier)
        if all(row.key != task.key for row in self._journal.problems):
            default, held = (dict(c.choices) if c else None for c in (candidates[0], incumbent))
            self._write(ProblemRow(task.key, task.workload, task.weight, task.flops, task.bytes, default, held))
        self._active.append(active)
        self._ask(active, None)

    def _incumbent(self, task: Task) -> Candidate | None:
        """What is given or the database has for this very key; a resumed run keeps to what it began with."""
        for row in self._journal.problems:
            if row.key == task.key:
                return None if row.incumbent is None else Candidate(self._route, tuple(row.incumbent.items()))
        return self._incumbents.get(task.key)

    @cached_property
    def _incumbents(self) -> dict[ProblemKey, Candidate]:
        """What the database had before the run, and what was given in its place."""
        if self._settings.root is None:
            return {**self._given}
        found = database.load(self._settings.root)
        held = (found.entries(self._device.arch, self._device.name, op) for op in {task.op for task in self._tasks})
        return {key: Candidate.of(one.config) for entries in held for key, one in entries.items()} | {**self._given}

    def _apart(self, task: Task) -> Candidate | None:
        """What the task's launch stands in for, as this run or the database has it; a resumed run keeps to its own."""
        if APART not in self._settings.routes:
            return None
        begun = (candidate_of(row) for row in self._journal.measurements if (row.key, row.route) == (task.key, APART))
        return next(begun, None) or space.apart(task, partial(self._as_dispatched, task.problem))

    def _as_dispatched(self, problem: Problem, op: str, branches: tuple[int, ...]) -> list[Launched]:
        """What a call makes of some branches, after the run's own picks, and after the database where it has none."""
        key = key_of(problem, op, *branches)
        pick = next((pick for pick in reversed(self._journal.picks) if pick.key == key), None)
        if pick is not None and pick.is_beaten:
            parts = stood_in_for(op, branches)
            return [launch for part in parts for launch in self._as_dispatched(problem, *part)]
        if pick is not None:
            return [(op, branches, candidate_of(pick).config)]
        alone = replace(problem, branches=tuple(problem.branches[branch] for branch in branches))
        found, _ = launches_of(alone, self._device, op, Options(database=self._settings.root))
        return [(op, tuple(branches[branch] for branch in choice.branches), choice.config) for choice in found]

    def _ask(self, active: _Active, rows: list[Measurement] | None) -> None:
        """Hand over rows, and start with what is asked for next; answered from the journal as far as that goes."""
        while True:
            try:
                request = active.search.send(rows) if rows is not None else next(active.search)
            except StopIteration as end:
                self._finish(active, end.value)
                return
            active.request, active.answers, active.wants, active.singly = request, {}, [], False
            for place, candidate in enumerate(request.candidates):
                seen = active.earlier[request.stage, candidate]
                if seen and not (request.stage == "screen" and request.ragged):
                    self._remember(active, candidate, seen[0])
                    active.answers[place] = seen.popleft()
                else:
                    active.wants.append(place)
            if request.stage == "screen":
                self._compile(active)
            if active.wants or active.compiling:
                return
            rows = list(active.answers.values())

    def _remember(self, active: _Active, candidate: Candidate, row: Measurement) -> None:
        """What later rows of a candidate repeat."""
        active.raced += row.stage == "race"
        if row.stage == "screen":
            active.resources[candidate] = row.resources
        if row.stage == "check" and row.error is not None and row.tolerance:
            before = active.checked.get(candidate, (0.0, 1.0))
            active.checked[candidate] = max(before, (row.error, row.tolerance), key=lambda pair: pair[0] / pair[1])

    def _answer(self, active: _Active, rows: Mapping[int, Measurement]) -> None:
        """Rows for some places of a request; the search goes on once it has all."""
        assert active.request is not None
        self._write(*rows.values())
        if not any(active is other for other in self._active):
            return  # given up meanwhile
        for place, row in rows.items():
            self._remember(active, active.request.candidates[place], row)
            active.answers[place] = row
            active.wants.remove(place)
        if not active.wants and not active.compiling:
            self._ask(active, [active.answers[place] for place in sorted(active.answers)])

    def _finish(self, active: _Active, verdict: Verdict | None) -> None:
        self._active.remove(active)
        pick = None if verdict is None else _pick(active, verdict)
        if pick is not None:
            self._write(pick)
            self._unsaved.append(pick)
            if time.monotonic() - self._saved >= SAVE_S:
                self._save()
        self._progress.picked(active.task, pick)

    def _drop_unraced(self) -> bool:
        """The budget is spent: who has raced nobody gives up, the others come to their finals. Whether any did."""
        unraced = [active for active in self._active if active.raced < 2]
        for active in unraced:
            active.search.close()
            self._active.remove(active)
            self._pool.drop(partial(_is_of, active))
        dropped = bool(self._waiting or unraced)
        self._waiting.clear()
        return dropped

    def _save(self) -> None:
        """Fold what was picked since the last time; what cannot be saved stays in the journal, for the next start."""
        picks, self._unsaved = self._unsaved, []
        if self._settings.root is not None and picks:
            folding.fold(self._journal, picks, self._device, self._settings.root)
            self._saved = time.monotonic()

    def _write(self, *rows: journal.Row) -> None:
        self._writer.add(*rows)
        for row in rows:
            self._journal.add(row)

    # ---- Compiling ---------------------------------------------------------------------------------------------------

    def _compile(self, active: _Active) -> None:
        """Queue a request's kernels; external routes have nothing to compile."""
        assert active.request is not None
        task, ragged = active.task, active.request.ragged
        for place in list(active.wants):
            candidate = active.request.candidates[place]
            if candidate.route == KERNEL and self._settings.compiler is not None:
                problem = ragged_problem(task.problem) if ragged else task.problem
                job = Compilation(problem, task.op, task.merge and not ragged, candidate)
                self._pool.submit(_Label(active, active.request, place), job, urgent=bool(active.resources))
                active.compiling += 1
            elif not ragged:
                nothing = Resources(0, 0, 0) if candidate.route == self._route else None
                active.answers[place] = replace(self._row(active, candidate, "screen", "ok"), resources=nothing)
                self._remember(active, candidate, active.answers[place])
                self._write(active.answers[place])
            active.wants.remove(place)

    def _take_compiled(self) -> None:
        rows: dict[int, Any] = {}
        for label, compiled in self._pool.answers():
            active, request, place = label
            if not any(active is other for other in self._active):
                continue  # given up
            active.compiling -= 1
            if not request.ragged:
                row = self._screened(active, request.candidates[place], compiled)
                self._write(row)
                self._remember(active, request.candidates[place], row)
                active.answers[place] = row
            if not active.compiling:
                rows[id(active)] = active
        for active in rows.values():
            self._ask(active, [active.answers[place] for place in sorted(active.answers)])

    def _screened(self, active: _Active, candidate: Candidate, compiled: Compiled) -> Measurement:
        row = self._row(active, candidate, "screen", compiled.status, message=compiled.message)
        row = replace(row, resources=compiled.resources)
        if compiled.status == "ok" and compiled.resources is not None and compiled.resources.spills:
            said = f"spills {compiled.resources.spills} bytes a thread"
            return replace(row, status="screened", message=said)
        return row

    # ---- Measuring ---------------------------------------------------------------------------------------------------

    def _give_work(self) -> None:
        """Idle measuring processes take the first search that waits for one, and stay with it."""
        for worker in self._workers:
            if worker.busy:
                continue
            for active in self._active:
                waits = active.wants and not active.compiling and active.worker in (None, worker)
                if waits and all(active is not other for other, _ in self._measuring.values()):
                    active.worker = worker
                    places = active.wants[:1] if active.singly else list(active.wants)
                    self._measuring[worker] = active, places
                    worker.submit(self._job(active, places), self._settings.candidate_s)
                    break

    def _job(self, active: _Active, places: Sequence[int]) -> CheckJob | TimeJob:
        request, task = active.request, active.task
        assert request is not None
        candidates = tuple(request.candidates[place] for place in places)
        self._progress.note(f"{task.op} {task.key.branches}: {request.stage} {candidates[0].name}")
        if request.stage == "check":
            return CheckJob(task, candidates[0], request.ragged)
        budget = self._settings.finals_us if request.stage == "finals" else self._settings.race_us
        return TimeJob(task, candidates, budget, request.limit_us)

    def _take_measured(self) -> None:
        for worker in list(self._measuring):
            if (found := worker.answer()) is None:
                continue
            active, places = self._measuring.pop(worker)
            assert active.request is not None
            if isinstance(found, NoStart):
                self._lose(worker, found)
                continue
            self._failed_starts[worker] = 0
            if isinstance(found, (Lost, Raised)) and len(places) > 1:
                active.singly = True  # nobody knows who of them it was
                continue
            candidates = [active.request.candidates[place] for place in places]
            rows = self._rows(active, candidates, found)
            self._answer(active, dict(zip(places, rows, strict=True)))

    def _lose(self, worker: Worker, found: NoStart) -> None:
        """A GPU whose process does not start again and again is given up, and its searches go to the others."""
        self._failed_starts[worker] += 1
        if self._failed_starts[worker] < STARTS:
            return
        self._workers.remove(worker)
        for active in self._active:
            active.worker = None if active.worker is worker else active.worker
        if not self._workers:
            raise DeviceLost(
                f"{self._device.name} does not answer any more ({found.message}); what was measured is in "
                f"{self._settings.journal}: mend it, and go on with --resume"
            )

    def _rows(self, active: _Active, candidates: Sequence[Candidate], found: Any) -> list[Measurement]:
        assert active.request is not None
        stage = active.request.stage
        if isinstance(found, (Lost, Raised)):
            status, message = _failure(found)
            return [self._row(active, candidate, stage, status, message=message) for candidate in candidates]
        if isinstance(found, Checked):
            status = "correctness" if found.wrong else "ok"
            tails = "tails: " if active.request.ragged and found.wrong else ""
            row = self._row(active, candidates[0], stage, status, message=tails + found.wrong)
            finite = found.error if found.error < float("inf") else None
            return [replace(row, error=finite, tolerance=found.tolerance)]
        return [self._timed(active, *pair) for pair in zip(candidates, found, strict=True)]

    def _timed(self, active: _Active, candidate: Candidate, found: Timed | str) -> Measurement:
        assert active.request is not None
        if isinstance(found, str):
            return self._row(active, candidate, active.request.stage, "runtime", message=found)
        row = self._row(active, candidate, active.request.stage, "ok")
        flag = "noisy" if found.noisy else ""
        return replace(row, median_us=found.median, low_us=found.low, high_us=found.high, flag=flag)

    def _row(self, active: _Active, candidate: Candidate, stage: str, status: str, *, message: str = "") -> Measurement:
        variant = database.TORCH if candidate.route == TORCH == self._route else None
        if candidate.route == KERNEL:
            variant = launched(active.task.problem, active.task.op, candidate.config, self._texts).variant.name
        error, tolerance = active.checked.get(candidate, (None, None))
        return Measurement(
            active.task.key,
            dict(candidate.choices),
            candidate.route,
            variant,
            stage,
            status,
            resources=active.resources.get(candidate),
            error=error,
            tolerance=tolerance,
            message=message,
        )


class _Label(NamedTuple):
    """Whose compilation it is."""

    active: _Active
    request: Request
    place: int


def takes_tails(task: Task, candidate: Candidate) -> bool:
    """Calls of ragged sizes would run a candidate too. Some that give all gradients in one launch are for even ones."""
    if candidate.route != KERNEL:
        return True
    problem, branches = ragged_problem(task.problem), every_branch(task.problem)
    text = text_for(problem, branches, task.op, candidate.config, generated.names())
    if text is None or task.op != BACKWARD:
        return text is not None
    return may_give_all_gradients(problem, branches, candidate.config, text) is None


def _is_of(active: _Active, label: _Label) -> bool:
    return label.active is active


def _pick(active: _Active, verdict: Verdict) -> Pick:
    winner, finals = verdict.winner, verdict.finals
    assert winner.median_us is not None and winner.low_us is not None and winner.high_us is not None
    ours = [row for row in finals if row.status == "ok" and row.route == winner.route]
    untuned = next((row for row in ours if row.config == dict(active.default.choices)), None)
    second = min((row for row in ours if row is not winner), key=lambda row: row.median_us or 0.0, default=None)
    return Pick(
        key=active.task.key,
        config=winner.config,
        route=winner.route,
        why=verdict.why,
        median_us=winner.median_us,
        low_us=winner.low_us,
        high_us=winner.high_us,
        default_us=_quiet_us(untuned),
        second_us=_quiet_us(second),
        candidates=verdict.raced,
        apart_us=_quiet_us(verdict.apart),
    )


def _quiet_us(row: Measurement | None) -> float | None:
    """The time of a row, where there is one, unless it spread too wide."""
    return None if row is None or row.flag else row.median_us


def _failure(found: Lost | Raised) -> tuple[str, str]:
    """Status and message of what raised or never came back."""
    if isinstance(found, Lost):
        return ("timeout" if found.timeout else "runtime"), found.message
    kinds = {
        "OutOfMemoryError": "resources",
        "OutOfResources": "resources",
        "MemoryError": "resources",
        "CompilationError": "compile",
        "PTXASError": "compile",
        "Corrupted": "illegal_access",
    }
    if "illegal memory access" in found.message:
        return "illegal_access", found.message
    if "out of memory" in found.message or "allocate memory" in found.message:
        return "resources", found.message
    return kinds.get(found.kind, "runtime"), found.message
