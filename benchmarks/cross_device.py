"""`python -m benchmarks.cross_device`: what is lost where a GPU runs what was tuned on another one.

    python -m benchmarks.cross_device --of nvidia-h200          # on an H100: benchmarks/results/cross_device_<gpu>.json

The database has entries of both. Where the two GPUs' configurations for a launch are the same nothing is lost; where
they differ, the borrowed one and this GPU's own are timed again in turn here. The loss is the borrowed one's time over
its own. It tells whether an entry of the same chip, or only of the same architecture, should go before what lies close
to the problem on this very GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

from rich.console import Console
from rich.table import Table

from benchmarks import retimed
from benchmarks.retimed import Row
from dilated_attention_pytorch import database
from dilated_attention_pytorch import device as devices
from dilated_attention_pytorch.config import Problem
from dilated_attention_pytorch.database import Database
from dilated_attention_pytorch.device import Device, Toolchain
from dilated_attention_pytorch.errors import ArgumentError
from dilated_attention_pytorch.tuning import problems, progress
from dilated_attention_pytorch.tuning.tune import Progress, Settings


def main() -> int:
    """Time what differs, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", required=True, metavar="NAME", help="the other GPU, e.g. h200")
    retimed.add_options(parser, budget=480.0)
    arguments = parser.parse_args()
    device = devices.current()
    if device is None:
        print("this measurement needs a GPU")
        return 2
    other, found = devices.simulated(arguments.of), database.load()
    calls = problems.preset("standard")
    with tempfile.TemporaryDirectory() as folder:
        settings = retimed.settings(arguments, folder)
        measured = measure(other, device, found, calls, settings, progress.shown())
    what = "what was tuned on another GPU over what was tuned on this one, timed in turn on this one"
    document = retimed.write(
        "cross_device",
        arguments,
        device,
        {"what": what, "borrowed_from": other.name, "database": found.digest(), **measured},
    )
    show(document)
    return 0 if document["measured"] == document["asked"] else 1


def measure(
    other: Device,
    device: Device,
    found: Database,
    calls: list[tuple[str, Problem]],
    settings: Settings,
    shown: Progress,
) -> Row:
    """Each launch that both GPUs have an entry for.

    Args:
        other: Whose entries are borrowed.
        device: What measures.
        found: The database.
        calls: What the entries were measured on.
        settings: Of the measuring.
        shown: Who is told how far it is.

    Raises:
        ArgumentError: It is the same GPU, or another architecture's, or one of the two has no entries.
    """
    if other.name == device.name or other.arch != device.arch:
        raise ArgumentError(
            f"{other.name} ({other.arch}) lends {device.name} ({device.arch}) nothing; name another GPU"
        )
    toolchain = Toolchain.current()
    sides = [retimed.usable(found, device, name, toolchain) for name in (other.name, device.name)]
    for side, name in zip(sides, (other.name, device.name), strict=True):
        if not side:
            raise ArgumentError(f"the database has nothing of {name} that still counts; tune it there first")
    return retimed.side_by_side(*sides, problems.of_calls(calls, device), device, settings, shown)


def show(document: Row) -> None:
    """The table that a person reads."""
    table = Table(
        title=f"{document['measured']} of {document['asked']} launches, {document['same_configuration']} alike"
    )
    for column in ("launch", "borrowed", "us", "own", "us", "loss"):
        table.add_column(column, justify="right" if column in ("us", "loss") else "left")
    for row in retimed.slowest_first(document["rows"], "ratio"):
        if "times" in row:
            (borrowed, own), loss = row["times"], row["failure"] or f"{row['ratio']:.3f}"
            table.add_row(row["launch"], borrowed["config"], retimed.us(borrowed), own["config"], retimed.us(own), loss)
    console = Console(width=170)
    console.print(table)
    if document["measured"]:
        mean, worst, share = (document[name] for name in ("geometric_mean", "worst", "share_within"))
        console.print(f"loss: {mean:.3f} (geometric mean), {worst:.3f} (worst); {share:.1%} within 2 %")


if __name__ == "__main__":
    sys.exit(main())
