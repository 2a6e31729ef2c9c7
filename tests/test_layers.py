"""Who may know whom: the floors of the house, held by reading every import."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
PACKAGE = "dilated_attention_pytorch"
FLOORS = (
    {"errors", "variant", "config", "precision", "source_hash", "device", "workloads", "_layout", "_strict_yaml"},
    {"call_config", "order", "_curves", "_plot", "reference", "database", "heuristics", "generated"},
    {"runtime"},
    {"tuning", "kernels", "distributed", "modules", "utils", "compat"},
    {"", "cli", "commands", "doctor"},
)
"""Parts of the package from the lowest floor up; a folder stands for all its files, "" for the package's `__init__`."""
WITHOUT_TORCH = ("errors", "variant", "config", "source_hash", "_layout", "_strict_yaml", "database", "heuristics")


class Import(NamedTuple):
    """One import statement: who, what, where, and whether it runs as soon as the file is imported."""

    importer: str
    imported: str
    place: str
    at_once: bool


def part(module: str) -> str:
    """The part of the package that a module belongs to: `dilated_attention_pytorch.runtime.plan` -> `runtime`."""
    return module.split(".")[1] if "." in module else ""


def statements(parent: ast.AST, at_once: bool = True) -> Iterator[tuple[ast.stmt, bool]]:
    """Every statement, and whether it runs with the import of its file: not in a function, not for type checkers."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, (ast.stmt, ast.ExceptHandler, ast.match_case)):
            if isinstance(node, ast.stmt):
                yield node, at_once
            function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            yield from statements(node, at_once and not function and not for_types)


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, absolute; `from x import y` as x.y where that is a module and as x where it is not."""
    relative = path.relative_to(SRC if path.is_relative_to(SRC) else ROOT).with_suffix("")
    is_package = relative.name == "__init__"
    module = ".".join(relative.parent.parts if is_package else relative.parts)
    for node, at_once in statements(ast.parse(path.read_text(encoding="utf-8"))):
        place = f"{path.relative_to(ROOT)}:{node.lineno}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, place, at_once)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                is_module = (SRC / deeper.replace(".", "/")).with_suffix(".py").exists()
                is_folder = (SRC / deeper.replace(".", "/")).is_dir()
                yield Import(module, deeper if is_module or is_folder else base, place, at_once)


def imports_under(folder: Path) -> list[Import]:
    return [found for path in sorted(folder.rglob("*.py")) for found in imports(path)]


OURS = imports_under(SRC)


def test_every_part_stands_on_a_floor() -> None:
    """A new file would be outside every rule: give it a floor above."""
    stem = {path.stem for path in (SRC / PACKAGE).glob("*.py")} - {"__init__"}
    folders = {path.name for path in (SRC / PACKAGE).iterdir() if list(path.glob("*.py"))}
    assert stem | folders <= set().union(*FLOORS)


def test_a_file_imports_from_its_floor_or_below() -> None:
    """The oracle that calls a kernel, or the database that asks the tuner: circles, and nothing testable alone."""
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    wrong = [
        f"{found.place} imports {found.imported} from above"
        for found in OURS
        if found.imported.split(".")[0] == PACKAGE
        and floor.get(part(found.imported), 0) > floor.get(part(found.importer), 0)
    ]
    assert wrong == []


def test_modules_import_each_other_in_no_circle() -> None:
    """A circle works until somebody imports its other end first."""
    edges: dict[str, set[str]] = {}
    for found in OURS:
        if found.at_once and found.imported.startswith(f"{PACKAGE}.") and found.imported != found.importer:
            edges.setdefault(found.importer, set()).add(found.imported)
    while edges:
        leaves = {target for targets in edges.values() for target in targets} - edges.keys()
        done = {name for name, targets in edges.items() if not targets}
        assert leaves or done, f"a circle among {sorted(edges)}"
        edges = {name: targets - leaves - done for name, targets in edges.items() if name not in done}


def test_the_runtime_does_not_know_the_tuner() -> None:
    """A call of the user's would start to measure."""
    assert [f.place for f in OURS if part(f.importer) == "runtime" and part(f.imported) == "tuning"] == []


def test_the_package_does_not_know_the_workshop() -> None:
    """It would render at run time, or fail wherever there is no checkout."""
    workshop = {"codegen", "jinja2", "templates", "benchmarks", "tests"}
    assert [f.place for f in OURS if f.imported.split(".")[0] in workshop] == []


def test_kernels_are_loaded_through_their_home_alone() -> None:
    """`import generated.x` would make a second copy of each kernel."""
    everywhere = OURS + imports_under(ROOT / "tests") + imports_under(ROOT / "codegen")
    assert [f.place for f in everywhere if f.imported.split(".")[0] == "generated"] == []


def test_generated_modules_know_triton_alone() -> None:
    """A kernel file that needs the package could not be read, compiled or profiled by itself."""
    known = {"__future__", "triton"}
    assert [f.place for f in imports_under(ROOT / "generated") if f.imported.split(".")[0] not in known] == []


def test_nothing_imports_triton_at_once() -> None:
    """The package has to be imported where there is no triton: macOS, Windows."""
    assert [f.place for f in OURS if f.at_once and f.imported.split(".")[0] == "triton"] == []


def test_the_package_needs_torch_alone_at_once() -> None:
    """An import that only a developer has installed."""
    at_once = {found.imported.split(".")[0] for found in OURS if found.at_once}
    assert at_once - sys.stdlib_module_names == {PACKAGE, "torch"}


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_plain_values_do_not_know_torch(name: str) -> None:
    """A lookup in the database would cost an import of torch, and a laptop could not do one."""
    assert [f.place for f in OURS if part(f.importer) == name and f.imported.split(".")[0] == "torch"] == []


def test_the_workshop_knows_names_and_hashes_alone() -> None:
    """It would need torch."""
    floor_0 = {f"{PACKAGE}.{name}" for name in ("errors", "variant", "source_hash")}
    ours = {f.imported for f in imports_under(ROOT / "codegen") if f.imported.startswith(PACKAGE)}
    assert ours <= floor_0
