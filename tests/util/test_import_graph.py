"""Modules import each other in one direction: the rooms of CONTRIBUTING.md stay rooms."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import kegfast

ROOT = Path(kegfast.__file__).parent


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in ROOT.rglob("*.py")}


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when a module is imported, without what is there for type checkers alone."""
    for statement in body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from statements(statement.orelse)
            continue
        yield statement
        for field in ("body", "orelse", "handlers", "finalbody"):
            inner = getattr(statement, field, [])
            if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from statements(inner)


def imported(module: str) -> set[str]:
    """The package's modules that this one imports at its top level."""
    found = set()
    for statement in statements(ast.parse(MODULES[module].read_text()).body):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            names = {f"{statement.module}.{alias.name}" for alias in statement.names}
            found |= names & MODULES.keys() or {statement.module}
    return found & MODULES.keys() - {module}


def test_no_circles() -> None:
    graph = {module: imported(module) for module in MODULES}
    assert graph["kegfast.nn.tucker"] >= {"kegfast.dispatch.tucker2", "kegfast.functional"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def below(module: str) -> set[str]:
    """All that is imported with it, packages' __init__ left aside."""
    found: set[str] = set()
    new = {module}
    while new:
        found |= new
        new = {other for one in new for other in imported(one)} - found
    return found


def imported_late(module: str) -> set[str]:
    """The package's modules that its functions import."""
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    tree = ast.parse(MODULES[module].read_text())
    inside = [node for f in ast.walk(tree) if isinstance(f, functions) for node in ast.walk(f)]
    return {node.module for node in inside if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize(
    ("room", "above"),
    [
        ("decomposition", ("nn", "compression")),
        ("ops", ("nn", "compression")),
        ("dispatch", ("nn", "compression")),
        ("functional", ("nn", "compression")),
        ("nn", ("compression", "_tuning")),
    ],
)
def test_nothing_from_above_is_imported_late(room: str, above: tuple[str, ...]) -> None:
    inside = [module for module in MODULES if f"{module}.".startswith(f"kegfast.{room}.")]
    assert inside
    for module in inside:
        tops = {name.split(".")[1] for name in imported_late(module) if name.startswith("kegfast.")}
        assert tops.isdisjoint(above), module


def test_rooms_look_down_only() -> None:
    for module in MODULES:
        floor = module.split(".")[1] if module.count(".") > 1 else ""
        if floor in ("ops", "dispatch", "decomposition", "_util"):
            above = {"kegfast.nn", "kegfast.functional", "kegfast._tuning", "kegfast.compression"}
            assert not {
                other for other in below(module) for top in above if f"{other}.".startswith(f"{top}.")
            }
        if floor == "nn":
            assert not any(other.startswith("kegfast.compression") for other in below(module))
