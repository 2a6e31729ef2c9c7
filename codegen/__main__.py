"""`python -m codegen`: render the variants of matrix.py into generated/."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace

from dilated_attention_pytorch.errors import CodegenError

from . import matrix, sync

MEND = "python -m codegen"

EPILOG = """\
A kernel of ours runs only if its text is committed under generated/. So, after a change of a template or of the
matrix: run this, read `git diff generated/`, and commit both.

  python -m codegen                        render everything, write what differs
  python -m codegen --check                write nothing; fail if generated/ is not what would be rendered
  python -m codegen --list                 what is rendered, and why
  python -m codegen --add 3000:5           segments of 3000 steps at dilation rate 5
  python -m codegen --add 3000:5:hilbert   the same, visited in the order of any permutation
  python -m codegen --add 128:2:snake:all  every step asks, keys are thinned, rows of a grid run to and fro
  python -m codegen --add full:3           one segment, however long the sequence
  python -m codegen --add 2048:1+4096:2    two branches in one pass, nested ones: the narrowest first

Segments and dilation rates that are not listed work too: they run through the general variants.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 1 where something differs that may not."""
    parser = argparse.ArgumentParser(
        prog="python -m codegen", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawTextHelpFormatter
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="write nothing; exit 1 if generated/ is out of date")
    action.add_argument("--list", action="store_true", help="print the matrix: each variant and the reason for it")
    action.add_argument(
        "--add", metavar="PATTERN", help="add segment:dilation[:order][:queries], or several joined by +"
    )
    chosen = parser.parse_args(arguments)
    try:
        code = _list() if chosen.list else _check() if chosen.check else _generate(chosen.add)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Such as head's. Python flushes once more when it ends: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as if SIGPIPE had ended it
    except CodegenError as error:
        parser.exit(2, f"{MEND}: {error}\n")


def _list() -> int:
    width = max(len(variant.name) for variant in matrix.VARIANTS)
    for variant, reason in matrix.VARIANTS.items():
        print(f"{variant.name:{width}}  {reason}")
    return 0


def _check() -> int:
    differences = sync.compare(sync.render_all(matrix.VARIANTS))
    for difference in differences:
        print(f"{difference.kind:8} generated/{difference.file}")
        if difference.diff:
            print("  " + difference.diff.replace("\n", "\n  "))
    _complain_of_foreign(differences)
    ours = sum(difference.kind != "foreign" for difference in differences)
    if ours:
        print(f"{ours} {'file differs' if ours == 1 else 'files differ'} from what is rendered; mend: {MEND}")
    return 1 if differences else 0


def _generate(spec: str | None) -> int:
    patterns = list(matrix.PATTERNS)
    added = None if spec is None else matrix.parse(spec)
    if added and any(replace(pattern, reason=added.reason) == added for pattern in patterns):
        print(f"{spec} is in codegen/matrix.py already")
        added = None
    if added:
        patterns.append(added)
    texts = sync.render_all(matrix.expand(patterns))
    if added:
        matrix.add(added)
        print(f"added {spec} to codegen/matrix.py")
    differences = sync.write(texts)
    for difference in differences:
        if difference.kind != "foreign":
            print(f"{'removed' if difference.kind == 'orphan' else 'wrote':8} generated/{difference.file}")
    written = sum(difference.kind in ("missing", "stale") for difference in differences)
    print(f"{len(texts)} modules, {written} written")
    return _complain_of_foreign(differences)


def _complain_of_foreign(differences: list[sync.Difference]) -> int:
    """Name files that are not ours; returns 1 if there is one: whatever lies in generated/ can be loaded."""
    foreign = [difference.file for difference in differences if difference.kind == "foreign"]
    for file in foreign:
        print(f"generated/{file} was not rendered by this program: move it away", file=sys.stderr)
    return 1 if foreign else 0


if __name__ == "__main__":
    sys.exit(main())
