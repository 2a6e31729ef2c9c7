"""Which rendered text runs a branch: the most special one whose promises this problem and these tiles keep."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from ..config import (
    BACKWARD,
    BY_KEYS,
    IN_GLUON,
    LaunchConfig,
    Problem,
    ProblemKey,
    head_offsets,
    next_power_of_two,
)
from ..variant import Variant, is_chain

HELD_BY_A_RING = (64, 128)
"""Rows of a segment whose dk and dv the warpgroups of one CTA hold, 64 each, in Gluon."""
CHAIN_ROWS = 512
"""Rows that each class of a chain's narrowest segment has a multiple of: tiles divide them, and are many. On an H100 a
chain of five with 128 rows a class took 1.2 times as long as the first three of it with 512 and the others alone."""


def text_for(
    problem: Problem, branches: tuple[int, ...], op: str, config: LaunchConfig, texts: frozenset[str]
) -> Variant | None:
    """The rendered variant that computes a branch, or a chain of them, with these tiles; None where there is none."""
    if len(branches) == 1:
        return variant_for(problem, branches[0], op, config, texts)
    if config.loads in IN_GLUON and refuses_ring(problem, branches, op, config):
        return None
    levels = [problem.branches[branch] for branch in branches]
    rows = rows_of_class(problem, branches)
    if rows % config.block_m or rows % config.block_n:
        return None
    variant = _of_chain(levels, _fills_classes(problem, branches, config), ring=config.loads in IN_GLUON)
    if variant.name in texts:
        return variant
    return None if variant.ring else _of_chain(levels, even=False)


def rows_of_class(problem: Problem, branches: tuple[int, ...]) -> int:
    """Rows that each residue class of a chain's steps has in the narrowest segment; tiles divide them."""
    return problem.branches[branches[0]][0] // problem.branches[branches[-1]][1]


def chain(problem: Problem, texts: frozenset[str]) -> tuple[int, ...]:
    """The branches that one pass computes, the narrowest first; none where no text does or the call forbids it."""
    found = nested(problem)
    while len(found) > 1:
        if _of_chain([problem.branches[branch] for branch in found], even=False).name in texts:
            return tuple(found)
        found.pop()
    return ()


def stood_in_for(op: str, branches: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The launches that one launch is in the place of, as (operation, branches) in their order; none of a plain one."""
    if op == BACKWARD:
        return [("dkdv", branches), ("dq", branches)]
    return [(op, (branch,)) for branch in branches] if len(branches) > 1 else []


def may_give_all_gradients(
    problem: Problem, branches: tuple[int, ...], config: LaunchConfig, variant: Variant
) -> str | None:
    """Why a text must not give dq, dk and dv in one launch with these tiles; None where it may."""
    if not variant.joinable or not (variant.one_tile or config.block_n == problem.rows(branches[0])):
        return f"{variant.name} has no tile of {config.block_n} keys that holds all that a query sees"
    if problem.head_offset == "table":
        return "a table of offsets may keep heads out, whose dq another launch clears"
    return None


def nested(problem: Problem) -> list[int]:
    """The branches that one pass could compute if there were a text, the narrowest first.

    Dropout tells the copies of a key apart, a detached mix the branches; an order or a table of offsets would have to
    be looked up for each class.
    """
    plain = problem.queries == "dilated" and problem.order == "none" and problem.mix_grad == "exact"
    if not plain or problem.dropout or problem.head_offset == "table" or problem.query_range is not None:
        return []
    found: list[int] = []
    for branch in sorted(range(len(problem.branches)), key=lambda branch: problem.branches[branch][::-1]):
        if _extends(problem, found, branch):
            found.append(branch)
    return found


def _of_chain(levels: list[tuple[int, int]], even: bool, *, ring: bool = False) -> Variant:
    return Variant(*levels[0], even=even, wider=tuple(levels[1:]), ring=ring)


def _fills_classes(problem: Problem, branches: tuple[int, ...], config: LaunchConfig) -> bool:
    """Nothing of a chain is ragged: tiles fill the rows of each residue class, and segments the sequence.

    A last segment that is cut short would leave tiles of its span outside of the sequence.
    """
    whole = problem.length % problem.segment(branches[-1]) == 0
    stride = problem.branches[branches[-1]][1]
    return whole and problem.length % (stride * max(config.block_m, config.block_n)) == 0


def _extends(problem: Problem, found: list[int], branch: int) -> bool:
    """A branch goes on with a chain: its segments hold the earlier ones', its kept steps are among theirs."""
    rate = problem.branches[branch][1]
    if problem.padding == "zeros" and not problem.causal and _has_phantoms(problem, branch):
        return False
    if not found:
        return True
    levels = [problem.branches[place] for place in (*found, branch)]
    if not is_chain(levels) or levels[0][0] // rate % CHAIN_ROWS:
        return False
    before = levels[-2][1]
    offsets = (head_offsets(problem.head_offset, problem.heads, r) for r in (before, rate))
    return all((wider - narrower) % before == 0 for narrower, wider in zip(*offsets, strict=True))


def _has_phantoms(problem: Problem, branch: int) -> bool:
    segment = problem.segment(branch)
    return problem.length % segment != 0 or segment % problem.branches[branch][1] != 0


def refuses_ring(problem: Problem, branches: tuple[int, ...], op: str, config: LaunchConfig) -> str | None:
    """Why no text with a ring of tiles computes a branch with these tiles; None where one may."""
    branch = branches[0]
    rows = problem.rows(branch)
    if len(branches) > 1 and (reason := _refuses_chain(problem, branches, op, config)):
        return reason
    if op == BACKWARD and (rows not in HELD_BY_A_RING or config.block_n != rows or config.block_m % 64):
        return f"a ring gives all gradients of segments of {' or '.join(map(str, HELD_BY_A_RING))} rows, by 64 or more"
    stay, loop = (config.block_n, config.block_m) if op in BY_KEYS else (config.block_m, config.block_n)
    if config.num_warps % 4 or stay % (16 * config.num_warps) or loop > 256:
        return "a warpgroup of a ring takes 64 rows of the tile that stays"
    if config.loads == "producer" and (op, config.block_m, config.num_warps) != ("fwd", 128, 8):
        return "a producer loads for two warpgroups of a forward, 128 rows"
    if op == "dq" and config.num_stages < 2:
        return "dq begins a tile's scores while it holds the tile before: its ring has two places at least"
    if problem.queries == "all" or problem.mask or problem.dropout:
        return "a ring of tiles knows no mask or dropout, and the kept steps alone ask"
    if len(branches) > 1:
        return None
    if acting_order(problem, branch) != "none":
        if op == BACKWARD or config.loads == "producer":
            return "along an order a ring's fwd, dkdv or dq loads for itself"
        return None if fills(problem, branch, op, config) else "along an order a ring has no tails, of rows or columns"
    if op == BACKWARD and problem.heads != problem.kv_heads:
        return "a ring gives all gradients of keys that one head asks"
    if fills(problem, branch, op, config):
        return None
    if op == BACKWARD:
        return f"tiles of {config.name} do not fill the segments, these not the sequence, or rows not their tile"
    if problem.head_offset == "table":
        return "a ragged ring knows no table of offsets"
    if problem.branches[branch][1] > 1 and not _asks_whole_segments(problem, branch):
        return "a ragged ring knows no part of a segment of which some steps alone are kept"
    return None


def _refuses_chain(problem: Problem, branches: tuple[int, ...], op: str, config: LaunchConfig) -> str | None:
    """Why no ring computes several branches in one pass with these tiles; None where one may."""
    if op == BACKWARD or config.loads == "producer":
        return "several branches share a ring's fwd, dkdv or dq, which loads for itself"
    if config.num_stages != 2:
        return "the ring of several branches has two places: it knows what comes two turns ahead"
    unpadded = problem.head_dim == next_power_of_two(problem.head_dim)
    if problem.branches[branches[0]][1] > 1 or not unpadded or not _fills_classes(problem, branches, config):
        return "the ring of several branches has no tails, of rows or columns, and the first branch keeps every step"
    return None


def fills(problem: Problem, branch: int, op: str, config: LaunchConfig) -> bool:
    """Nothing is ragged: neither rows of tiles nor columns."""
    unpadded = problem.head_dim == next_power_of_two(problem.head_dim)
    return unpadded and _even(problem, branch, op, config, one_tile=False)


def variant_for(problem: Problem, branch: int, op: str, config: LaunchConfig, texts: frozenset[str]) -> Variant | None:
    """The most special of the rendered variants that computes this branch with these tiles.

    A text for the segment length and dilation rate goes before one for a single segment of any length, and that before
    the general one; among the texts of a pattern, the fewer loops and tail masks the better.

    Args:
        problem: The call.
        branch: Index into its branches.
        op: "fwd", "dkdv", "dq" or "bwd".
        config: The tiles.
        texts: Names of the modules that there are.

    Returns:
        None if not even the general text is there, or none with the ring that the tiles ask for.
    """
    if config.loads in IN_GLUON:
        if refuses_ring(problem, (branch,), op, config):
            return None
        one = op == BACKWARD
        patterns = (pattern for pattern in _patterns(problem, branch) if not (one and pattern[0] == "full"))
        order = "none" if acting_order(problem, branch) == "none" else "hilbert"  # a snake is read faster than computed
        if fills(problem, branch, op, config):
            rings = (Variant(*pattern, order, one_tile=one, even=True, ring=True) for pattern in patterns)
        else:
            rings = (Variant(*pattern, ring=True) for pattern in patterns if pattern[1] is None)
        return next((variant for variant in rings if variant.name in texts), None)
    order = acting_order(problem, branch)
    one_tile = _one_tile(problem, branch, op, config)
    for segment, dilation in _patterns(problem, branch):
        for one, even in ((True, True), (True, False), (False, True), (False, False)):
            if one and (segment == "full" or not one_tile):
                continue
            if even and not _even(problem, branch, op, config, one):
                continue
            variant = Variant(segment, dilation, order, problem.queries, one, even)
            if variant.name in texts:
                return variant
    return None


def acting_order(problem: Problem, branch: int) -> str:
    """The order of a branch, "none" where it changes nothing.

    A branch that keeps every step is a function of the sets of tokens in its segments. An order that leaves these sets
    as they are is left out: any order where one segment holds everything, a snake whose rows are not cut by a segment's
    end while they run backwards. Causality goes by token and does not mind.
    """
    if problem.order == "none" or problem.branches[branch][1] > 1 or not _asks_whole_segments(problem, branch):
        return problem.order
    if problem.is_full(branch) or (problem.order == "snake" and _rows_stay_in_segments(problem, branch)):
        return "none"
    return problem.order


def key_of(problem: Problem, op: str, *branches: int) -> ProblemKey:
    """What a launch is measured under: a branch whose order changes nothing runs the unordered text."""
    return replace(ProblemKey.of(problem, op, *branches), order=acting_order(problem, branches[0]))


def query_rows(problem: Problem, branch: int) -> int:
    """Rows of queries of a whole segment: the kept steps, or all of them."""
    return problem.rows(branch) if problem.queries == "dilated" else problem.segment(branch)


def _patterns(problem: Problem, branch: int) -> Iterator[tuple[int | str | None, int | None]]:
    """(segment, dilation) of the texts that may run a branch, most special first."""
    dilation = problem.branches[branch][1]
    # Offsets from a table may keep a head out of the branch, which texts of dilation 1 have no code for.
    fixed = problem.head_offset != "table" or dilation > 1
    if fixed:
        yield problem.segment(branch), dilation
    if problem.is_full(branch):
        if fixed:
            yield "full", dilation
        yield "full", None
    yield None, None


def _one_tile(problem: Problem, branch: int, op: str, config: LaunchConfig) -> bool:
    """One tile holds the keys of a segment and, where the kernel walks over queries, these too."""
    queries_held = op not in BY_KEYS or config.block_m >= query_rows(problem, branch)
    return config.block_n >= problem.rows(branch) and queries_held


def _even(problem: Problem, branch: int, op: str, config: LaunchConfig, one_tile: bool) -> bool:
    return why_ragged(problem, branch, op, config, one_tile) is None


def why_ragged(problem: Problem, branch: int, op: str, config: LaunchConfig, one_tile: bool) -> str | None:
    """What is not whole; None where segments fill the sequence, kept rows the segments and tiles the rows."""
    segment, dilation = problem.segment(branch), problem.branches[branch][1]
    keys, queries = problem.rows(branch), query_rows(problem, branch)
    if problem.length % segment:
        return f"N {problem.length} is no multiple of segments of {segment}"
    if segment % dilation:
        return f"segments of {segment} are no multiple of dilation {dilation}"
    if not _asks_whole_segments(problem, branch):
        return "a part of a segment is asked"
    if problem.head_offset == "table":
        return "a table of offsets may keep heads out, whose tiles are all tail"
    if one_tile and op in BY_KEYS and dilation > 1 and problem.heads != problem.kv_heads:
        return "heads of a group that keep other steps are masked like a tail"
    whole = keys % config.block_n == 0 and queries % config.block_m == 0
    held = keys == config.block_n and (op not in BY_KEYS or queries == config.block_m)
    if not whole or (one_tile and not held):
        return f"tiles of {config.block_m} by {config.block_n} do not fill {queries} by {keys} rows"
    return None


def _asks_whole_segments(problem: Problem, branch: int) -> bool:
    if problem.query_range is None:
        return True
    first, stop = problem.query_range
    segment = problem.segment(branch)
    return first % segment == 0 and (stop % segment == 0 or stop == problem.length)


def _rows_stay_in_segments(problem: Problem, branch: int) -> bool:
    """No end of a segment cuts a grid row that runs backwards. Such ends recur after two rows' worth of segments."""
    segment, width = problem.segment(branch), problem.row_width
    first = segment * (problem.prefix // segment + 1)
    period = segment * (2 * width // math.gcd(segment, 2 * width))
    ends = range(first, min(problem.length, first + period), segment)
    return all((end - problem.prefix) % width == 0 or (end - problem.prefix) // width % 2 == 0 for end in ends)
