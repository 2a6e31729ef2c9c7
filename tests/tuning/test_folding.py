"""From a journal to entries: what is recorded of a pick, and what was measured beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dilated_attention_pytorch.database import Resources
from dilated_attention_pytorch.tuning.folding import entry_of, is_noisy
from dilated_attention_pytorch.tuning.journal import Journal, Measurement, Pick, ProblemRow

from ..measurements import CONFIG, entry
from .made_up import RUN

KEY = entry("dkdv").key
OURS = Measurement(
    KEY, CONFIG.to_dict(), "kernel", "general", "finals", "ok", 100.0, 99.0, 101.0, Resources(9, 9, 0), 1e-4, 1e-2
)
CUDNN = Measurement(KEY, {"gradients": "all"}, "cudnn", None, "finals", "ok", 80.0, 79.0, 81.0)
PICK = Pick(KEY, CONFIG.to_dict(), "kernel", "fastest", 100.0, 99.0, 101.0, 120.0, None, 9)


@pytest.mark.parametrize(
    ("beside", "recorded"),
    [
        ([CUDNN], 80.0),
        ([replace(CUDNN, flag="noisy")], None),
        ([replace(CUDNN, status="runtime", median_us=None)], None),
        ([replace(CUDNN, stage="check")], None),
        ([replace(CUDNN, key=entry("fwd").key)], None),
        ([replace(CUDNN, route="torch")], None),
        ([], None),
    ],
    ids=["timed", "noisy", "failed", "checked", "another's", "torch", "none"],
)
def test_what_cudnn_took_is_recorded_beside_the_pick(beside: list[Measurement], recorded: float | None) -> None:
    """Calls that go to cuDNN for a time that was another problem's, or that nobody would have recorded of ours."""
    journal = Journal()
    for row in (RUN, replace(OURS, stage="check"), OURS, *beside, PICK):
        journal.add(row)
    found = entry_of(PICK, journal, RUN)
    assert found is not None and found.time_us.cudnn == recorded
    assert (found.time_us.median, found.time_us.default) == (100.0, 120.0)


@pytest.mark.parametrize(
    ("flagged", "recorded"),
    [("pick", False), ("default", False), ("second", True), (None, True)],
)
def test_no_pick_is_recorded_beside_a_default_of_wide_times(flagged: str | None, recorded: bool) -> None:
    """A gain over a number that nobody trusts; or, without the number, an entry that says the default does not run."""
    others = {"default": {**PICK.config, "num_warps": 8}, "second": {**PICK.config, "num_stages": 1}}
    journal = Journal()
    journal.add(RUN)
    journal.add(ProblemRow(KEY, "longnet", 1.0, 1e9, 1e6, default=others["default"], incumbent=None))
    for name, config in {"pick": PICK.config, **others}.items():
        journal.add(replace(OURS, stage="check", config=config))
        journal.add(replace(OURS, config=config, flag="noisy" if name == flagged else ""))
    assert (entry_of(PICK, journal, RUN) is not None) == recorded
    assert is_noisy(PICK, journal) != recorded
