"""`python -m benchmarks.repeatability`: do two tuning runs that know nothing of each other come to the same?

    python -m benchmarks.repeatability FIRST SECOND             # benchmarks/results/repeatability_<gpu>.json
    python -m benchmarks.repeatability FIRST SECOND --preset quick

FIRST and SECOND are databases' folders. One that holds nothing of this GPU is tuned first, as `dilated-attention tune
--db` does it, which takes as long as its preset. Where both picked the same configuration for a launch there is nothing
to time; where they differ, both are timed again in turn. A launch is repeatable if its two times are within 2 % of each
other, and the tuner if 95 % of the launches are. The comparison writes to neither database.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import retimed
from benchmarks.retimed import Row
from dilated_attention_pytorch import cli, database
from dilated_attention_pytorch import device as devices
from dilated_attention_pytorch.config import ProblemKey
from dilated_attention_pytorch.database import Entry
from dilated_attention_pytorch.device import Device, Toolchain
from dilated_attention_pytorch.errors import ArgumentError
from dilated_attention_pytorch.tuning import problems, progress

WANTED = 0.95
"""Of the launches."""


def main() -> int:
    """Tune what is not there, time what differs, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("databases", type=Path, nargs=2, metavar="FOLDER", help="of two independent runs")
    parser.add_argument("--preset", choices=tuple(problems.PRESETS), default="standard", help="default standard")
    retimed.add_options(parser, budget=480.0)
    arguments = parser.parse_args()
    device = devices.current()
    if device is None:
        print("this measurement needs a GPU")
        return 2
    sides = [entries(folder, arguments.preset, device) for folder in arguments.databases]
    tasks = problems.of_calls(problems.preset(arguments.preset), device)
    with tempfile.TemporaryDirectory() as folder:
        settings = retimed.settings(arguments, folder)
        found = retimed.side_by_side(*sides, tasks, device, settings, progress.shown())
    what = "what one tuning run picked over what another picked, timed in turn; 1 where both picked the same"
    document = retimed.write("repeatability", arguments, device, {"what": what, "preset": arguments.preset, **found})
    show(document)
    return 0 if document["measured"] == document["asked"] and document["share_within"] >= WANTED else 1


def entries(folder: Path, preset: str, device: Device) -> dict[ProblemKey, Entry]:
    """What a database has for this GPU, tuned first where it has nothing.

    Raises:
        ArgumentError: The run came to nothing.
    """
    toolchain = Toolchain.current()
    if not folder.is_dir() or not retimed.usable(database.load(folder), device, device.name, toolchain):
        cli.main(
            ["tune", "--preset", preset, "--db", str(folder), "--runs", str(folder.with_name(f"{folder.name}-runs"))]
        )
    found = retimed.usable(database.load(folder), device, device.name, toolchain) if folder.is_dir() else {}
    if not found:
        raise ArgumentError(f"{folder} holds nothing of {device.name} that still counts; tune into another folder")
    return found


def show(document: Row) -> None:
    """The table that a person reads."""
    table = Table(
        title=f"{document['measured']} of {document['asked']} launches, {document['same_configuration']} alike"
    )
    for column in ("launch", "first", "us", "second", "us", "first over second"):
        table.add_column(column, justify="right" if column in ("us", "first over second") else "left")
    for row in retimed.slowest_first(document["rows"], "ratio"):
        if "times" in row:
            (first, second), ratio = row["times"], row["failure"] or f"{row['ratio']:.3f}"
            table.add_row(
                row["launch"], first["config"], retimed.us(first), second["config"], retimed.us(second), ratio
            )
    console = Console(width=170)
    console.print(table)
    if document["share_within"] is not None:
        console.print(f"within 2 %: {document['share_within']:.1%} of the launches (at least {WANTED:.0%})")


if __name__ == "__main__":
    sys.exit(main())
