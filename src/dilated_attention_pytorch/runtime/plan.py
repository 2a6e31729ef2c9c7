"""From a problem and a device to a list of launches: pure, memoised, and with the reasons on record."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from .. import _layout, database, generated, heuristics
from .. import device as devices
from ..call_config import OPS as CALL_OPS
from ..call_config import CallConfig
from ..config import BACKWARD, EVERY_OP, IN_GLUON, RESULTS, LaunchConfig, Problem, ProblemKey
from ..database import FRESH, INVALID, KERNEL_STALE, Database, Hit, Lookup, Times
from ..device import INTERPRETER, Device, Toolchain
from ..errors import ArgumentError, ConfigError, DatabaseMiss, UnsupportedError
from ..variant import Variant
from .options import DEFAULTS, Options
from .refusals import cudnn_takes, refusals, torch_refusals
from .variants import (
    acting_order,
    chain,
    key_of,
    may_give_all_gradients,
    query_rows,
    refuses_ring,
    rows_of_class,
    stood_in_for,
    text_for,
    why_ragged,
)

BACKENDS = ("triton", "torch", "reference")


@dataclass(frozen=True)
class Choice:
    """One launch.

    Attributes:
        op: "fwd", "dkdv", "dq", or "bwd" for all gradients at once.
        branch: Index into the problem's branches.
        variant: The text that runs.
        config: Its launch configuration.
        rung: The rung of the ladder that gave the configuration.
        why: The evidence for it.
        passed: (rung, sentence) of every offer that was passed over, in the order of the ladder.
        wider: Further branches that the launch computes.
        merge: It adds to what an earlier launch of its operation wrote; else it writes every row.
    """

    op: str
    branch: int
    variant: Variant
    config: LaunchConfig
    rung: str
    why: str
    passed: tuple[tuple[str, str], ...]
    wider: tuple[int, ...] = ()
    merge: bool = False

    @classmethod
    def of(
        cls,
        op: str,
        branches: tuple[int, ...],
        variant: Variant,
        config: LaunchConfig,
        rung: str,
        why: str,
        passed: tuple[tuple[str, str], ...] = (),
        *,
        merge: bool = False,
    ) -> Choice:
        """The launch of some branches, the narrowest first."""
        first, *wider = branches
        return cls(op, first, variant, config, rung, why, passed, tuple(wider), merge)

    @property
    def branches(self) -> tuple[int, ...]:
        """All branches that the launch computes, the narrowest first."""
        return (self.branch, *self.wider)

    @property
    def stores(self) -> tuple[str, ...]:
        """The results that it writes, or merges into what an earlier launch wrote."""
        return RESULTS[self.op]


@dataclass(frozen=True)
class CallChoice:
    """How the torch backend cuts a branch into calls, where that was measured.

    Attributes:
        op: "fwd", or "dkdv" for the whole backward.
        branch: Index into the problem's branches.
        config: What was picked.
        why: The evidence for it.
    """

    op: str
    branch: int
    config: CallConfig
    why: str


@dataclass(frozen=True)
class Plan:
    """What a call will do.

    Attributes:
        problem: The call.
        device: The GPU, `INTERPRETER`, or None for a CPU.
        backend: "triton", "torch", "reference", or "cudnn" where it takes an operation.
        launches: In their order, the forward's before the backward's. The first one of an operation writes every row,
            zeros where its branch keeps no step, and later ones merge into that. Empty for the other backends.
        refusals: (backend or rung, sentence) of everything that was passed over as a whole.
        rung: The lowest rung of the ladder that any launch came from; the backend's name for the other backends.
        calls: Of the torch backend, what the user's own database has measured on this processor.
        beaten: Joint launches whose measurement says that those which they stand in for are faster: these are launched.
        external: (operation, evidence) of "fwd" and "bwd", where cuDNN takes it in the place of the launches.
    """

    problem: Problem
    device: Device | None
    backend: str
    launches: tuple[Choice, ...]
    refusals: tuple[tuple[str, str], ...]
    rung: str
    calls: tuple[CallChoice, ...] = ()
    beaten: tuple[Choice, ...] = ()
    external: tuple[tuple[str, str], ...] = ()

    def hands_over(self, op: str) -> bool:
        """cuDNN takes "fwd", or "bwd" for the whole backward, in the place of the launches."""
        return any(name == op for name, _ in self.external)

    def of(self, op: str) -> tuple[Choice, ...]:
        """The launches of one operation."""
        return tuple(choice for choice in self.launches if choice.op == op)

    @property
    def fwd(self) -> tuple[Choice, ...]:
        """The launches of the forward."""
        return self.of("fwd")

    @property
    def backward(self) -> tuple[Choice, ...]:
        """The launches of the backward, those of a branch side by side."""
        return tuple(choice for choice in self.launches if choice.op != "fwd")

    def call_config(self, op: str, branch: int) -> CallConfig:
        """How the torch backend cuts a branch: as measured, else the untuned default."""
        measured = (choice.config for choice in self.calls if (choice.op, choice.branch) == (op, branch))
        return next(measured, CallConfig.untuned(op, self.problem, branch))

    @property
    def mix_grad(self) -> str:
        """ "exact" or "detached", as in the call."""
        return self.problem.mix_grad

    def explain(self, *, backward: bool = True) -> str:
        """The whole story: backend, text, configuration, rung and evidence of each launch, and why nothing else.

        Args:
            backward: Tell of the gradients' launches too.
        """
        from .story import tell

        return tell(self, backward=backward)

    def __str__(self) -> str:
        return self.explain()


def plan(
    problem: Problem,
    device: Device | None,
    backend: str | None = None,
    options: Options = DEFAULTS,
    *,
    backward: bool = True,
    toolchain: Toolchain | None = None,
    committed: Database | None = None,
    texts: frozenset[str] | None = None,
) -> Plan:
    """The plan of a call: the same for the same arguments, on every rank.

    Args:
        problem: The call without its tensors.
        device: What it runs on; None is a CPU.
        backend: One of `BACKENDS`, or None to choose.
        options: As in `options(...)`.
        backward: Gradients will be asked for: the options hold for their kernels too.
        toolchain: What compiles the kernels; None asks this process.
        committed: The tuning database; None is the one in git.
        texts: Names of the generated modules; None asks the folder.

    Raises:
        UnsupportedError: `backend` refuses, or every backend does; the message has every reason.
        ConfigError: `options.config` does not fit the device.
        DatabaseMiss: `options.on_miss` is "error", and a launch was never measured for this problem.
        DatabaseError: A file of the tuning database is broken.
        ArgumentError: `backend` is none.
    """
    if backend not in (*BACKENDS, None):
        raise ArgumentError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    return _plan(
        problem,
        device,
        backend,
        options,
        backward,
        _toolchain() if toolchain is None else toolchain,
        database.load() if committed is None else committed,
        _rendered() if texts is None else texts,
    )


@lru_cache
def _toolchain() -> Toolchain:
    """Asked once: Triton too looks at TRITON_INTERPRET when the kernels are loaded, and not again."""
    return Toolchain.current()


@lru_cache
def _own_database() -> Path | None:
    """Where `dilated-attention tune` keeps what an installed package measured; None in a checkout, or before it did."""
    folder = _layout.own_db_dir()
    return folder if not _layout.is_checkout() and folder.is_dir() else None


@lru_cache
def _rendered() -> frozenset[str]:
    return generated.names()


@lru_cache(maxsize=1024)
def _plan(
    problem: Problem,
    device: Device | None,
    backend: str | None,
    options: Options,
    backward: bool,
    toolchain: Toolchain,
    committed: Database,
    texts: frozenset[str],
) -> Plan:
    if backend in ("torch", "reference"):
        if reasons := torch_refusals(problem):
            raise UnsupportedError(f"the {backend} backend refuses: {'; '.join(reasons)}")
        measured = (
            _measured_calls(problem, options, toolchain, committed) if (backend, device) == ("torch", None) else ()
        )
        return Plan(problem, device, backend, launches=(), refusals=(), rung=backend, calls=measured)
    if device is None and toolchain.interpret:
        device = INTERPRETER
    reasons = refusals(problem, device, toolchain)
    if not reasons and device is not None:
        overlay = overlay_of(options)
        try:
            question = _Question(problem, device, options, backward, toolchain, committed, overlay, texts)
            launches, beaten = _launches(question)
        except _NothingFits as error:
            reasons = (str(error),)
        else:
            rung = max((choice.rung for choice in launches), key=list(LADDER).index)
            external = () if backend == "triton" else _external(question, launches)
            taken = "cudnn" if external else "triton"
            return Plan(problem, device, taken, launches, refusals=(), rung=rung, beaten=beaten, external=external)
    if backend == "triton":
        raise UnsupportedError(f"the triton backend refuses: {'; '.join(reasons)}")
    if last := torch_refusals(problem):
        raise UnsupportedError(f"no backend takes this; triton: {'; '.join(reasons)}; torch: {'; '.join(last)}")
    measured = _measured_calls(problem, options, toolchain, committed) if device is None else ()
    refused = tuple(("triton", reason) for reason in reasons)
    return Plan(problem, device, "torch", (), refused, rung="torch", calls=measured)


def launches_of(
    problem: Problem,
    device: Device,
    op: str,
    options: Options = DEFAULTS,
    *,
    toolchain: Toolchain | None = None,
    committed: Database | None = None,
) -> tuple[tuple[Choice, ...], tuple[Choice, ...]]:
    """The launches of one operation whatever a call makes of the others, and joint ones of it that were beaten.

    Args:
        problem: As in `plan`; so are the others.
        device: As there.
        op: "fwd", "dkdv", "dq", or "bwd", of which nothing is launched that nobody measured.
        options: As there.
        toolchain: As there.
        committed: As there.

    Raises:
        UnsupportedError: No kernel takes the problem, or not even the smallest tiles fit the device.
    """
    told = _toolchain() if toolchain is None else toolchain
    found = database.load() if committed is None else committed
    if reasons := refusals(problem, device, told):
        raise UnsupportedError(f"the triton backend refuses: {'; '.join(reasons)}")
    question = _Question(problem, device, options, True, told, found, overlay_of(options), _rendered())
    beaten: list[Choice] = []
    try:
        parts = [_joint_or_apart(question, op, branches, beaten) for branches in launch_order(problem, question.texts)]
    except _NothingFits as error:
        raise UnsupportedError(str(error)) from error
    return tuple(itertools.chain(*parts)), tuple(beaten)


def launch_order(problem: Problem, texts: frozenset[str]) -> list[tuple[int, ...]]:
    """A chain, then the others by dilation: the first launch covers most steps, so the fewest rows are mere zeros."""
    first = chain(problem, texts)
    alone = ((branch,) for branch in _by_dilation(problem) if branch not in first)
    return [*([first] if first else []), *alone]


def _by_dilation(problem: Problem) -> list[int]:
    return sorted(range(len(problem.branches)), key=lambda branch: problem.branches[branch][1])


def overlay_of(options: Options) -> Database | None:
    """The database that goes before the committed one: that of `options`, else the user's own of an installed package.

    Raises:
        DatabaseError: There is no such folder.
    """
    own = _own_database() if options.database is None else options.database
    return None if own is None else database.load(own)


def _measured_calls(
    problem: Problem, options: Options, toolchain: Toolchain, committed: Database
) -> tuple[CallChoice, ...]:
    """What the user's own database has for this very problem and processor; none was committed."""
    if (overlay := overlay_of(options)) is None:
        return ()
    found = []
    for branch, op in itertools.product(range(len(problem.branches)), CALL_OPS):
        for hit in Lookup(key_of(problem, op, branch), devices.cpu(), toolchain, committed, overlay).in_overlay():
            if hit.status == FRESH and isinstance(hit.entry.config, CallConfig):
                found.append(CallChoice(op, branch, hit.entry.config, f"overlay: {_evidence(hit)}"))
    return tuple(found)


# ---- The ladder ------------------------------------------------------------------------------------------------------


class _NothingFits(Exception):
    """No rung has a launch that this device can make."""


@dataclass(frozen=True)
class _Question:
    """What the rungs are asked: `_plan`'s arguments, for the branches of one launch."""

    problem: Problem
    device: Device
    options: Options
    backward: bool
    toolchain: Toolchain
    committed: Database
    overlay: Database | None
    texts: frozenset[str]
    branches: tuple[int, ...] = ()

    def lookup(self, op: str) -> Lookup:
        """This question, put to the database."""
        key = key_of(self.problem, op, *self.branches)
        return Lookup(key, self.device, self.toolchain, self.committed, self.overlay)


class _Offer(NamedTuple):
    """A configuration that a rung puts forward; `unfit` says why it cannot be launched here, `times` what it took."""

    config: LaunchConfig
    why: str
    unfit: str | None
    times: Times | None = None


def _explicit(question: _Question, op: str) -> list[_Offer]:
    config = dict(question.options.config).get(op)
    if config is None:
        return []
    offer = _estimated(question, op, config, "options(config=...)")
    if offer.unfit and (op == "fwd" or question.backward):
        raise ConfigError(f"options(config=...) for {op}: {offer.unfit}; choose smaller blocks or fewer stages")
    return [offer]


def _overlay(question: _Question, op: str) -> list[_Offer]:
    return _measured(question, op, question.lookup(op).in_overlay())


def _exact(question: _Question, op: str) -> list[_Offer]:
    return _measured(question, op, question.lookup(op).exact())


def _same_silicon(question: _Question, op: str) -> list[_Offer]:
    return _measured(question, op, question.lookup(op).same_silicon())


def _nearest(question: _Question, op: str) -> list[_Offer]:
    return _measured(question, op, question.lookup(op).nearest())


def _other_device(question: _Question, op: str) -> list[_Offer]:
    return _measured(question, op, question.lookup(op).other_device())


def _stale(question: _Question, op: str) -> list[_Offer]:
    return _measured(question, op, question.lookup(op).stale(), stale=True)


def _heuristic(question: _Question, op: str) -> list[_Offer]:
    configs = untuned(question.problem, question.branches, op, question.device.arch, question.texts)
    if op == BACKWARD:  # in Triton nobody knows whether it pays before it is measured
        configs = [config for config in configs if config.loads in IN_GLUON]
    return [_estimated(question, op, config, f"untuned default for {question.device.arch}") for config in configs]


def _floor(question: _Question, op: str) -> list[_Offer]:
    if op == BACKWARD:
        return []
    return [_estimated(question, op, config, "the smallest tiles") for config in heuristics.FLOOR]


LADDER: dict[str, tuple[Callable[[_Question, str], list[_Offer]], str]] = {
    "config": (_explicit, "options(config=...) names none for this kernel"),
    "overlay": (_overlay, "options(database=...) has no entry for this problem on this device"),
    "exact": (_exact, "tune_db has no entry for this problem on this device"),
    "silicon": (_same_silicon, "no entry for this problem on another device with this chip"),
    "nearest": (_nearest, f"no entry within distance {database.NEAREST:g} on this chip"),
    "arch": (_other_device, f"no entry within distance {database.NEAREST:g} on another device of this architecture"),
    "stale": (_stale, "no entry of an older kernel text"),
    "heuristic": (_heuristic, "no untuned default"),
    "floor": (_floor, "no floor"),
}
"""The ladder, best rung first, with what is said where a rung has no offer.

1. config: what `options(config=...)` says.
2. overlay: an entry for this very problem and device in the user's own database.
3. exact: the same in the committed one.
4. silicon: an entry for this problem on another device with the same chip.
5. nearest: an entry for a problem close by, on this device or its chip.
6. arch: an entry for this problem or one close by, on another device of the architecture.
7. stale: what 2 to 6 have, measured on a kernel text that has changed since.
8. heuristic: the untuned default. Of a launch for all gradients only where none of the two that it stands in for was
   measured for this problem.
9. floor: the smallest tiles.
10. torch: no launch of ours at all; the torch backend (see `_plan`).

Every rung must fit this device. The first offer that does is taken, and the choice carries its rung.
"""

MEASURED = ("config", "overlay", "exact", "silicon")
"""Rungs that `on_miss="error"` accepts: somebody chose or measured this very problem."""


def _launches(question: _Question) -> tuple[tuple[Choice, ...], tuple[Choice, ...]]:
    """The launches in their order, and joint ones that were beaten.

    A chain goes first, the others by dilation: the first launch covers most steps. In the backward the launches of a
    branch stand side by side: they read the same rows.
    """
    problem = question.problem
    found: list[Choice] = []
    beaten: list[Choice] = []
    for op, branches in itertools.product(("fwd", BACKWARD), launch_order(problem, question.texts)):
        found += _joint_or_apart(question, op, branches, beaten)
    turns = {branch: turn for turn, branch in enumerate(_by_dilation(problem))}
    found.sort(key=lambda choice: (choice.op != "fwd", not choice.wider, turns[choice.branch]))
    return _merging(found), tuple(beaten)


FASTER = 1.03
"""cuDNN takes an operation that it was faster at by so much: its time was not taken in turn with ours."""
QUEUED_US = 200.0
"""It takes no call that a GPU is done with sooner: torch's function takes the host so long to queue (188 us for `core`,
44 of cuDNN's on an H100, where our launch takes 47: benchmarks/results/host_*.json), and the host would decide."""


def _external(question: _Question, launches: tuple[Choice, ...]) -> tuple[tuple[str, str], ...]:
    """Operations that cuDNN computes, and was measured to be faster at: of this very problem, as our launches were."""
    if not cudnn_takes(question.problem, question.device):
        return ()
    alone = replace(question, branches=(0,))
    climbed = (_climb(alone, op) for op in EVERY_OP)
    times = {found[0].op: found[1] for found in climbed if found is not None and found[0].rung in MEASURED}
    judged = [("fwd", "fwd", ["fwd"])]
    if question.backward and not question.problem.deterministic:
        judged.append((BACKWARD, "dkdv", [choice.op for choice in launches if choice.op != "fwd"]))
    external = []
    for op, beside, ops in judged:
        ours = [taken.median for name in ops if (taken := times.get(name)) is not None]
        cudnn = taken.cudnn if (taken := times.get(beside)) is not None else None
        if cudnn is not None and len(ours) == len(ops) and cudnn > QUEUED_US and cudnn * FASTER < sum(ours):
            external.append((op, f"{cudnn:g} us beside {sum(ours):g} us of ours"))
    return tuple(external)


def _merging(launches: Iterable[Choice]) -> tuple[Choice, ...]:
    """Launches in their order, told whether an earlier one wrote what they write."""
    written: set[str] = set()
    found = []
    for choice in launches:
        found.append(replace(choice, merge=not written.isdisjoint(choice.stores)))
        written.update(choice.stores)
    return tuple(found)


def _joint_or_apart(question: _Question, op: str, branches: tuple[int, ...], beaten: list[Choice]) -> list[Choice]:
    """One launch; or those that it stands in for, where there is no offer of it, its measurement says that they are
    faster and it is beaten, or some of them were measured and it was not."""
    parts = stood_in_for(op, branches)
    found = _climb(replace(question, branches=branches), op)
    if found is None:
        return _apart(question, parts, beaten)
    choice, times = found
    if times is not None and times.is_beaten:
        beaten.append(choice)
        return _apart(question, parts, beaten)
    if op == BACKWARD and choice.rung == "heuristic":
        launches = _apart(question, parts, beaten)
        if any(launch.rung in MEASURED for launch in launches):
            return launches
    return [choice]


def _apart(question: _Question, parts: list[tuple[str, tuple[int, ...]]], beaten: list[Choice]) -> list[Choice]:
    return [launch for part in parts for launch in _joint_or_apart(question, *part, beaten)]


def untuned(
    problem: Problem, branches: tuple[int, ...], op: str, arch: str, texts: frozenset[str]
) -> list[LaunchConfig]:
    """The untuned configurations of a launch, best first; by descriptor where there is a text that takes any."""
    head_dim, dtype = problem.head_dim, problem.dtype
    if len(branches) > 1 and op == BACKWARD:
        return []  # no tile holds all keys that a query meets
    rows_of = query_rows(problem, branches[0]), problem.rows(branches[0])
    if len(branches) > 1:
        configs = heuristics.default_of_chain(op, head_dim, dtype, rows_of_class(problem, branches), arch)
    elif op == BACKWARD:
        configs = heuristics.default_of_all_gradients(head_dim, dtype, *rows_of, arch)
    else:
        pairs = ProblemKey.of(problem, op, branches[0]).grid
        ordered = acting_order(problem, branches[0]) != "none"
        ragged = why_ragged(problem, branches[0], op, heuristics.RING, one_tile=False) is not None
        suited = partial(heuristics.default, op, head_dim, dtype, *rows_of, arch, pairs=pairs, causal=problem.causal)
        configs = suited(ordered=ordered, ragged=ragged)
    return [config for config in configs if _is_loaded(problem, branches, op, config, texts)]


def _is_loaded(
    problem: Problem, branches: tuple[int, ...], op: str, config: LaunchConfig, texts: frozenset[str]
) -> bool:
    """There is a text that loads tiles as this configuration says."""
    variant = text_for(problem, branches, op, config, texts)
    loaded = variant is not None and (variant.ring or variant.described)
    return config.loads == "pointer" or loaded


def step_down(problem: Problem, choice: Choice) -> Choice:
    """The smallest tiles in place of a choice that could not be launched."""
    config = heuristics.FLOOR[-1]
    variant = text_for(problem, choice.branches, choice.op, config, _rendered())
    assert variant is not None, "there was a text for larger tiles"
    passed = (*choice.passed, (choice.rung, f"{choice.config.name} ran out of resources when it was launched"))
    return replace(choice, variant=variant, config=config, rung="floor", why="the smallest tiles", passed=passed)


def stepped_apart(plan: Plan, choice: Choice) -> Plan:
    """The plan with the smallest tiles of two launches in place of one for all gradients that could not be launched."""
    parts = [step_down(plan.problem, replace(choice, op=op)) for op, _ in stood_in_for(choice.op, choice.branches)]
    launches = [part for launch in plan.launches for part in (parts if launch == choice else [launch])]
    return replace(plan, launches=_merging(launches), rung="floor")


def _climb(question: _Question, op: str) -> tuple[Choice, Times | None] | None:
    """Down the ladder to the first offer that fits, and what it took where it was measured.

    Returns:
        None of a joint launch that nothing is offered for: what it stands in for will be asked.

    Raises:
        _NothingFits: Of another.
    """
    passed: list[tuple[str, str]] = []
    for rung, (offers, silence) in LADDER.items():
        found = offers(question, op)
        if not found:
            passed.append((rung, silence))
        for config, why, unfit, times in found:
            if unfit is not None:
                passed.append((rung, unfit))
                continue
            variant = text_for(question.problem, question.branches, op, config, question.texts)
            if variant is None and len(question.branches) == 1:
                raise _NothingFits("generated/ has no general text for this order; `python -m codegen` writes it")
            if variant is None:
                passed.append((rung, f"tiles of {config.name} do not divide the rows of a class"))
                continue
            if op == BACKWARD and (
                reason := may_give_all_gradients(question.problem, question.branches, config, variant)
            ):
                passed.append((rung, reason))
                continue
            if op == BACKWARD and _is_miss(question, op, rung):
                continue  # what it stands in for may be measured
            _refuse_miss(question, op, rung)
            return Choice.of(op, question.branches, variant, config, rung, why, tuple(passed)), times
    if stood_in_for(op, question.branches):
        return None
    raise _NothingFits(f"{op}: not even the smallest tiles fit: {passed[-1][1]}")


SPEAKS = 1.03
"""A pick of another problem that gained less over the untuned default leaves this one's as it is."""


def _is_miss(question: _Question, op: str, rung: str) -> bool:
    """The caller wants nothing that was not measured, and this was not."""
    return question.options.on_miss == "error" and rung not in MEASURED and (op == "fwd" or question.backward)


def _refuse_miss(question: _Question, op: str, rung: str) -> None:
    if _is_miss(question, op, rung):
        raise DatabaseMiss(
            f'on_miss="error": {question.device.name} has no measurement for {question.lookup(op).key}; tune it, '
            f'or allow what rung {rung!r} has with options(on_miss="fallback")'
        )


def _estimated(question: _Question, op: str, config: LaunchConfig, why: str) -> _Offer:
    """An offer that nobody has compiled: it fits by the estimate."""
    problem, device = question.problem, question.device
    need = heuristics.shared_bytes(op, problem.head_dim, problem.dtype, config, device.arch)
    return _Offer(config, why, _no_ring(question, op, config) or _too_big(device, config, need))


def _measured(question: _Question, op: str, hits: list[Hit], *, stale: bool = False) -> list[_Offer]:
    """Offers of entries: they fit by what their kernel took, which had this head_dim, dtype and op."""
    return [
        _Offer(hit.entry.launch, _evidence(hit), _unfit(question, op, hit, stale), hit.entry.time_us) for hit in hits
    ]


def _unfit(question: _Question, op: str, hit: Hit, stale: bool) -> str | None:
    named = f"{hit.entry.launch.name} on {hit.device}"
    if hit.status == INVALID:
        return f"{named} is invalid: it was wrong, or is too large for its own device"
    if hit.status == KERNEL_STALE and not stale:
        return f"{named} was measured on a kernel text that has changed since"
    problem, device, config = question.problem, question.device, hit.entry.launch
    if reason := _no_ring(question, op, config):
        return f"{named}: {reason}"
    alone = op != BACKWARD and len(question.branches) == 1
    if hit.distance and alone and hit.entry.time_us.gain < SPEAKS:
        return f"{named} is no reason to leave the untuned default, which took {hit.entry.time_us.default:g} us there"
    rows = problem.rows(question.branches[0])
    near, asked = hit.entry.key, key_of(problem, op, *question.branches)
    few = (heuristics.are_few(key.grid, _asking_rows(key), device.sms) for key in (near, asked))
    if hit.distance and alone and any(few):
        return f"{named} was not measured on this problem, and so few tiles speak for themselves alone"
    suits = heuristics.suits_a_producer(rows, asked.grid, problem.causal)
    if hit.distance and config.loads == "producer" and not suits:
        return f"{named} was measured on more: {asked.grid} segments of {rows} rows are too few for CTAs that stay"
    need = hit.entry.resources.shared_bytes
    text = text_for(problem, question.branches, op, config, question.texts)
    if text is not None and _loads_otherwise(text, hit, device.arch, problem):
        return f"{named} was measured on {'ragged' if text.described else 'whole'} tiles, which are loaded otherwise"
    if text is not None and hit.distance and alone and _is_of(hit, lambda of: of.even != text.even):
        return f"{named} was measured {'with tails, here are none' if text.even else 'without tails'}"
    if text is None or text.name not in hit.measured_on:
        # The same tiles take more in another text: one with a loop buffers what a text of one tile holds once.
        need = max(need, heuristics.shared_bytes(op, problem.head_dim, problem.dtype, config, device.arch))
    return _too_big(device, config, need)


def _asking_rows(key: ProblemKey) -> int:
    kept, stride = key.branches[0]
    return kept if key.queries == "dilated" else kept * stride


def _loads_otherwise(text: Variant, hit: Hit, arch: str, problem: Problem) -> bool:
    """Tiles that win by descriptor lose by pointers, and the other way round: by up to a fifth on an H100."""
    if not text.described and hit.entry.launch.loads == "descriptor":
        return True
    if not heuristics.takes_descriptors(arch, problem.head_dim, problem.dtype):
        return False
    return _is_of(hit, lambda of: of.described != text.described)


def _is_of(hit: Hit, question: Callable[[Variant], bool]) -> bool:
    """What is asked holds of all texts that an entry was measured on."""
    return bool(hit.measured_on) and all(question(Variant.from_name(name)) for name in hit.measured_on)


def _no_ring(question: _Question, op: str, config: LaunchConfig) -> str | None:
    """Why a text in Gluon cannot run, where the configuration asks for one."""
    if config.loads not in IN_GLUON:
        return None
    problem, arch, triton = question.problem, question.device.arch, question.toolchain.triton
    if not heuristics.takes_rings(arch, problem.head_dim, problem.dtype):
        return f"{arch} has no ring of tiles for head_dim {problem.head_dim} in {problem.dtype}"
    if not heuristics.reads_gluon(triton):
        return f"Triton {triton} has not compiled the texts in Gluon yet: {' and '.join(heuristics.GLUON)} have"
    return refuses_ring(problem, question.branches, op, config)


def _too_big(device: Device, config: LaunchConfig, need: int) -> str | None:
    threads = config.num_warps * device.warp_size
    if threads > devices.THREADS:
        return f"{config.name} needs {threads:,} threads a block; {device.name} has {devices.THREADS:,}"
    if need <= device.shared_bytes:
        return None
    return f"{config.name} needs {need:,} bytes of shared memory a block; {device.name} has {device.shared_bytes:,}"


def _evidence(hit: Hit) -> str:
    key, times, source = hit.entry.key, hit.entry.time_us, hit.entry.provenance
    toolchain = f"Triton {source.triton}" if isinstance(hit.entry.config, LaunchConfig) else f"torch {source.torch}"
    default = "" if times.default is None else f", untuned {times.default:g}"
    default += "" if times.apart is None else f", apart {times.apart:g}"
    problem = f" for [rows, stride] {list(map(list, key.branches))}, grid {key.grid}, at distance {hit.distance:.2f}"
    return (
        f"{times.median:g} us ({times.low:g} to {times.high:g}{default}) on {hit.device}"
        f"{problem if hit.distance else ''}, {toolchain}, {source.date}, {hit.status}"
    )
