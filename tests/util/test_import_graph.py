"""Modules import each other in one direction: the rooms of CONTRIBUTING.md stay rooms."""

import ast
import graphlib
from collections.abc import Iterable, Iterator
from pathlib import Path

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


def named(nodes: Iterable[ast.AST]) -> set[str]:
    """The package's modules that import statements among these name."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {node.module}
    return found & MODULES.keys()


def imported(module: str) -> set[str]:
    """The package's modules that this one imports at its top level."""
    return named(statements(ast.parse(MODULES[module].read_text()).body)) - {module}


def test_no_circles() -> None:
    graph = {module: imported(module) for module in MODULES}
    assert graph["kegfast.nn.tucker"] >= {"kegfast.dispatch.tucker2", "kegfast.functional"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


# From below.
ROOMS = (
    "version", "_util", "ops", "decomposition", "dispatch", "functional", "distributed", "nn", "_tuning",
    "models", "data", "training", "distillation", "extraction", "compression", "freezing", "recovery",
    "experiments", "cli",
)  # fmt: skip


def test_rooms_look_down_only() -> None:
    """Also inside functions, where an import runs late."""
    for module, path in MODULES.items():
        room = module.partition(".")[2].partition(".")[0]
        if room not in ROOMS:
            continue  # the front door, which leads everywhere
        seen = {name.split(".")[1] for name in named(ast.walk(ast.parse(path.read_text()))) if "." in name}
        above = seen & set(ROOMS[ROOMS.index(room) + 1 :])
        assert not above, (module, above)


def test_no_room_is_left_out() -> None:
    rooms = {name.split(".")[1] for name in MODULES if "." in name}
    assert rooms - set(ROOMS) == {"__main__", "runtime"}
