"""`dilated-attention report`: what a tuning run found, in the terminal and as a page."""

from __future__ import annotations

import argparse
import json
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArgumentError
from . import write

if TYPE_CHECKING:
    from . import Commands

DESCRIPTION = """\
What a tuning run found: how much of it was measured, the gain over the untuned defaults, candidates as good as the
picks, failures by kind, noisy times. It prints a summary, and writes one HTML file that needs no network: with every
problem's race as a plot, and where the picks stand under the device's roof.

A run that was killed, or still runs, has a report of what it has measured so far.
"""

EXAMPLES = """\
examples:
  dilated-attention report                                     the newest run, its page written beside the journal
  dilated-attention report h100 --open                         a run by name, its page opened in a browser
  dilated-attention report runs/h100.jsonl --html report.html
  dilated-attention report h100 --json | jq .gain              the numbers for a script
"""


def add(commands: Commands) -> None:
    """Add the parser."""
    parser = commands.add_parser(
        "report",
        help="what a tuning run found, as a summary and a page",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "journal", nargs="?", metavar="RUN", help="a run's name or its .jsonl file; default: the newest"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="where the page goes; default: beside the journal")
    parser.add_argument(
        "--json", action="store_true", help="print the numbers as JSON; no page without --html or --open"
    )
    parser.add_argument("--open", action="store_true", help="show the page in a browser")
    parser.set_defaults(run=_report)


def _report(chosen: argparse.Namespace) -> int:
    from ..tuning.journal import read
    from ..tuning.report import as_dict, page, show, summarise

    path = _journal(chosen.journal)
    try:
        report = summarise(read(path))
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error.strerror}") from error
    if chosen.json:
        print(json.dumps(as_dict(report), indent=2, allow_nan=False))
    else:
        show(report, sys.stdout)
    if chosen.html or chosen.open or not chosen.json:
        html: Path = chosen.html or path.with_suffix(".html")
        write(html, page(report), "--html")
        print(f"\npage: {html}", file=sys.stderr if chosen.json else sys.stdout)
        if chosen.open:
            webbrowser.open(html.resolve().as_uri())
    return 0


def _journal(run: str | None) -> Path:
    """The journal that a name or a path stands for; of no name, the one written last."""
    from ..tuning.journal import runs_dir

    folder = runs_dir()
    newest = sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)
    if run is None:
        if not newest:
            raise ArgumentError(
                f"there is no run in {folder}; `dilated-attention tune` makes one, or name its .jsonl file"
            )
        return newest[0]
    for path in (Path(run), folder / f"{run}.jsonl"):
        if path.is_file():
            return path
    known = ", ".join(path.stem for path in newest[:5]) or "none yet"
    raise ArgumentError(f"{run!r} is neither a journal file nor a run in {folder}; the newest there: {known}")
