"""Instructions that a warp issues, counted in machine code: loops weighed by how often they run.

A kernel's code (nvdisasm of a cubin with line numbers) becomes a graph of basic blocks. A loop is known by
the source line of its branch back, and by those that its function was inlined from. `Code.issued` weighs
every loop by its trips and takes the longest path through what remains: no warp issues more.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+)?\s*(?P<name>[A-Z][\w.]*)(?P<rest>[^;]*);"
)
LINE = re.compile(r'//## File "(?P<file>[^"]+)", line (?P<line>\d+)')
LABEL = re.compile(r"(?P<label>\.L_x_\d+|\$\S+):")
TARGET = re.compile(r"`\((?P<label>[^)]+)\)")
Place = tuple[str, ...]  # source lines, the innermost first, then where each was inlined
Piece = str | tuple[str, ...]  # of a place: text of one of its lines, or of several


class Block(NamedTuple):
    names: list[str]  # of its instructions
    places: list[Place]
    successors: list[int]
    calls: list[str]  # labels


class Loop(NamedTuple):
    head: int
    body: frozenset[int]
    place: Place  # of the branch back


class Code:
    """One kernel, from its section of a disassembly.

    `loops`: inner ones before those around them.
    """

    def __init__(self, text: str):
        self.blocks, self.labels = _blocks(text)
        self.loops = _loops(self.blocks)

    def issued(
        self,
        trips: Mapping[Piece, float],
        shares: Mapping[Piece, float] | None = None,
        one: Piece | None = None,
    ) -> float:
        """Warp instructions along the longest path.

        Args:
            trips: how often a loop runs, by its place; the first that fits counts.
            shares: of the times that the path comes by, in how many a place's instructions are issued;
                in all where it is not named.
            one: the place of a loop of which one round is asked for, instead of the whole kernel.

        Raises:
            ValueError: a loop on the path has no number of trips, or `one` is not one loop.
        """
        return _Count(self, trips, shares or {}).total(one)


class _Count:
    def __init__(self, code: Code, trips: Mapping[Piece, float], shares: Mapping[Piece, float]):
        self.code, self.trips, self.shares = code, trips, shares
        self.round: dict[int, float] = {}  # a loop's head -> what one round issues

    def total(self, one: Piece | None) -> float:
        if one is None:
            return self._longest(0, frozenset(range(len(self.code.blocks))))
        found = [loop for loop in self.code.loops if fits(loop.place, one)]
        if len(found) != 1:
            raise ValueError(f"expected one loop at {one!r}, got {[loop.place for loop in found]}")
        return self._round(found[0])

    def _round(self, loop: Loop) -> float:
        if loop.head not in self.round:
            self.round[loop.head] = self._longest(loop.head, loop.body)
        return self.round[loop.head]

    def _longest(self, head: int, body: frozenset[int]) -> float:
        """From the head through the body once, inner loops as often as they run."""
        inner = [loop for loop in self.code.loops if loop.body < body and loop.head != head]
        of = {block: loop for loop in inner for block in loop.body}  # outer ones come last
        known: dict[int, float] = {}

        def longest(block: int) -> float:
            if block not in known:
                loop = of.get(block)
                if loop is None:
                    own, after = self._own(block), set(self.code.blocks[block].successors)
                else:
                    own = trips * self._round(loop) if (trips := self._trips(loop)) else 0.0
                    after = {s for b in loop.body for s in self.code.blocks[b].successors} - loop.body
                ends = not after or any(s == head or s not in body for s in after)
                onward = [longest(s) for s in after if s in body and s != head]
                known[block] = own + max([*onward, *[0.0] * ends])
            return known[block]

        return longest(head)

    def _own(self, block: int) -> float:
        called = (self.code.labels[label] for label in self.code.blocks[block].calls)
        bodies = ((start, frozenset(_reached(self.code.blocks, start))) for start in called)
        return sum(map(self._share, self.code.blocks[block].places)) + sum(
            self._longest(*each) for each in bodies
        )

    def _share(self, place: Place) -> float:
        return next((share for piece, share in self.shares.items() if fits(place, piece)), 1.0)

    def _trips(self, loop: Loop) -> float:
        if self._share(loop.place) == 0:
            return 0
        for piece, number in self.trips.items():
            if fits(loop.place, piece):
                return number
        raise ValueError(f"no number of trips for the loop at {loop.place}")


def fits(place: Place, piece: Piece) -> bool:
    """Whether every part of the piece is in a line of the place."""
    parts = (piece,) if isinstance(piece, str) else piece
    return all(any(part in line for line in place) for part in parts)


@functools.cache
def _line(file: str, line: int) -> str:
    path = Path(file)
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return f"{path.name}:{line}: {lines[line - 1].strip() if line <= len(lines) else ''}"


def kernels(disassembly: str) -> Iterator[tuple[str, str]]:
    """(mangled name, text) of every function of a disassembly."""
    parts = re.split(r"^\.text\.(\S+):$", disassembly, flags=re.MULTILINE)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def _blocks(text: str) -> tuple[list[Block], dict[str, int]]:
    """Basic blocks, and which of them a label begins."""
    blocks: list[Block] = []
    labels: dict[str, int] = {}
    ends: list[tuple[str | None, bool]] = []  # a label to go to, and whether it goes on
    reunions: dict[str, str] = {}  # BSSY's barrier -> where its threads meet
    place: Place = ()
    lines: list[str] = []
    fresh = True
    for raw in text.splitlines():
        if found := LINE.search(raw):
            lines.append(_line(found["file"], int(found["line"])))
            continue
        label, instruction = LABEL.match(raw.strip()), INSTRUCTION.search(raw)
        if not label and not instruction:
            continue
        if fresh or (label and blocks[-1].names):
            blocks.append(Block([], [], [], []))
            ends.append((None, True))
            fresh = False
        if label:
            labels[label["label"]] = len(blocks) - 1
            continue
        if lines:
            place, lines = tuple(lines), []
        blocks[-1].names.append(instruction["name"])
        blocks[-1].places.append(place)
        name, rest = instruction["name"].split(".")[0], instruction["rest"]
        target, barrier = TARGET.search(rest), re.match(r"\s*(B\d+)", rest)
        guarded = instruction["guard"] is not None
        if name == "BSSY":
            reunions[barrier[1]] = target["label"]
        elif name == "CALL":
            blocks[-1].calls.append(target["label"])
        elif name == "BRX":
            raise ValueError("a branch to a computed place")
        elif name in ("BRA", "BSYNC"):
            to = target["label"] if target else reunions[barrier[1]]
            guarded |= re.match(r"\s*!?U?P\d", rest) is not None
            # Branches of warps whose lanes have parted, before collectives: ours have not.
            ends[-1] = (None, True) if instruction["name"] == "BRA.DIV" else (to, guarded)
            fresh = True
        elif name in ("EXIT", "RET"):
            ends[-1] = (None, guarded)
            fresh = True
    for i, (to, goes_on) in enumerate(ends):
        if to is not None:
            blocks[i].successors.append(labels[to])
        if goes_on and i + 1 < len(blocks):
            blocks[i].successors.append(i + 1)
    return blocks, labels


def _reached(blocks: list[Block], start: int, without: int | None = None) -> set[int]:
    seen, todo = set(), [start] * (start != without)
    while todo:
        block = todo.pop()
        if block not in seen:
            seen.add(block)
            todo += [s for s in blocks[block].successors if s != without]
    return seen


def _loops(blocks: list[Block]) -> list[Loop]:
    """Natural loops: branches back to a block through which every way to them leads."""
    before: dict[int, list[int]] = {i: [] for i in range(len(blocks))}
    for i, block in enumerate(blocks):
        for s in block.successors:
            before[s].append(i)
    alive = _reached(blocks, 0)
    loops: dict[int, Loop] = {}
    for i in sorted(alive):
        for head in blocks[i].successors:
            if head > i or (i in _reached(blocks, 0, without=head) and i != head):
                continue
            body, todo = {head}, [i]
            while todo:
                block = todo.pop()
                if block not in body:
                    body.add(block)
                    todo += before[block]
            known = loops[head].body if head in loops else frozenset()
            loops[head] = Loop(head, known | body, blocks[i].places[-1])
    ordered = sorted(loops.values(), key=lambda loop: len(loop.body))
    endless = [
        loop for loop in ordered if all(s in loop.body for b in loop.body for s in blocks[b].successors)
    ]
    return [loop for loop in ordered if loop not in endless]
