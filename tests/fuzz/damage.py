"""Ways in which a file may be damaged: its bytes, what they decompress to, and the values that they spell."""

import gzip
import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

COMMAND = "true"  # what an unpickler that executes would run: the audit hook sees it
WORDS = (
    "", "x" * 5000, "\0", "ä", "../../../../tmp/x", "a.b.c", ".", "a." * 3000 + "a", "__class__", "__init__",
    f"__import__('os').system('{COMMAND}')", f"x):\n import os; os.system('{COMMAND}')\n#", "os:system",
    "kegfast.cli:main", "kegfast.training.processes:leave", "kegfast.experiments.demo:demo", "nan", "1e999",
    "eval", "Linear", "Transformer", "LSTM", "getattr", "call_function", "output",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 255, 256, 2**15, 2**31 - 1, 2**31, -(2**31), 2**40, 2**63 - 1, 2**64, 10**30)
FLOATS = (0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"))


class Call:
    """Pickles as a call of `os.system`."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        import os

        return os.system, (COMMAND,)


def of_bytes(draw: random.Random, content: bytes) -> bytes:
    """One to four changes of the bytes."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        size = len(data)
        # Headers decide more than what they head.
        place = draw.randrange(min(size, 64) if draw.random() < 0.5 else size) if size else 0
        length = draw.choice((1, 2, 4, 8, draw.randrange(1, 65), draw.randrange(1, max(2, size))))
        way = draw.randrange(9)
        if way == 0:
            data[place : place + length] = draw.randbytes(length)
        elif way == 1 and size:
            data[place] ^= 1 << draw.randrange(8)
        elif way == 2:
            del data[place:]
        elif way == 3:
            del data[place : place + length]
        elif way == 4:
            data[place:place] = data[place : place + length]
        elif way == 5:
            data[place : place + length] = bytes([draw.choice((0, 255, 127, 128))]) * length
        elif way == 6:
            form = draw.choice("<>") + draw.choice("HIQ")
            number = draw.choice(NUMBERS) % 2 ** (8 * struct.calcsize(form))
            data[place : place + struct.calcsize(form)] = struct.pack(form, number)
        elif way == 7:
            data += draw.randbytes(length)
        else:
            data[place:place] = draw.choice(WORDS).encode()
    return bytes(data)


def of_values(draw: random.Random, value: Any) -> Any:
    """The same tree of plain containers with one to three of its parts replaced, lost or doubled."""
    for _ in range(draw.choice((1, 1, 1, 3))):
        value = _changed(draw, value)
    return value


def _changed(draw: random.Random, value: Any) -> Any:
    inner = isinstance(value, Mapping | list | tuple) and len(value) > 0
    if not inner or draw.random() < 0.1:
        return _replaced(draw, value)
    if isinstance(value, Mapping):
        key = draw.choice(list(value))
        kept = {k: v for k, v in value.items() if k != key}
        way = draw.random()
        if way < 0.1:
            return kept
        if way < 0.2:
            return kept | {draw.choice((*WORDS, *value)): value[key]}
        return {**value, key: _changed(draw, value[key])}
    place = draw.randrange(len(value))
    parts = list(value)
    way = draw.random()
    if way < 0.1:
        del parts[place]
    elif way < 0.2:
        parts.insert(place, parts[place])
    else:
        parts[place] = _changed(draw, parts[place])
    return type(value)(parts) if type(value) in (list, tuple) else parts


def _replaced(draw: random.Random, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _tensor(draw, value)
    if isinstance(value, str) and value[:1] in "[{" and draw.random() < 0.9:
        try:
            return json.dumps(of_values(draw, json.loads(value)))
        except (ValueError, RecursionError):
            pass
    deep: list[Any] = []
    for _ in range(draw.choice((1, 5000))):
        deep = [deep]
    choices = [
        None,
        True,
        [],
        {},
        deep,
        {"node": "x"},
        {"tuple": [1]},
        draw.choice(WORDS),
        draw.choice(FLOATS),
    ]
    if isinstance(value, int | float):
        choices += [value + draw.choice((1, -1)), -value, draw.choice(NUMBERS), draw.choice(NUMBERS)] * 2
    return draw.choice(choices)


def _tensor(draw: random.Random, tensor: torch.Tensor) -> Any:
    if tensor.is_meta or tensor.is_sparse:  # changed before
        return draw.choice((None, 3))
    ways = (
        lambda: tensor.flatten()[:-1],
        lambda: tensor.unsqueeze(0),
        lambda: tensor.double(),
        lambda: tensor.to(torch.int8),
        lambda: tensor.float() * float("nan"),
        lambda: tensor.flatten()[:0],
        lambda: tensor.flatten()[:1].expand(1 << 20),
        lambda: tensor.float().to_sparse() if tensor.dim() else None,
        lambda: torch.empty(tensor.shape, device="meta"),
        lambda: 3,
    )
    return draw.choice(ways)()


def of_json(draw: random.Random, content: bytes) -> bytes:
    """Another JSON text, or none."""
    if draw.random() < 0.3:
        return of_bytes(draw, content)
    if draw.random() < 0.05:
        return draw.choice((b"[" * 200_000, b'{"a":' * 200_000, b"1" * 10_000, b"NaN", b"\xff\xfe{}"))
    return _json(of_values(draw, json.loads(content)))


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 5000


def of_safetensors(draw: random.Random, content: bytes) -> bytes:
    """A file with another header, length or body."""
    if draw.random() < 0.3:
        return of_bytes(draw, content)
    size = int.from_bytes(content[:8], "little")
    header = _json(of_values(draw, json.loads(content[8 : 8 + size])))
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def of_torch(draw: random.Random, content: bytes) -> bytes:
    """A file of other values, of a call, or of damaged records."""
    way = draw.random()
    if way < 0.25:
        return of_bytes(draw, content)
    if way < 0.45:
        return of_zip(draw, content)
    if way < 0.5:
        return pickle.dumps({"model_state": Call()})
    value = torch.load(io.BytesIO(content), weights_only=True)
    value = _with_call(draw, value) if way < 0.6 else of_values(draw, value)
    written = io.BytesIO()
    try:
        torch.save(value, written, _use_new_zipfile_serialization=draw.random() < 0.8)
    except (RuntimeError, RecursionError, pickle.PicklingError):
        return of_bytes(draw, content)
    return written.getvalue()


def _with_call(draw: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value:
        key = draw.choice(list(value))
        return {**value, key: _with_call(draw, value[key])}
    return Call()


def of_zip(draw: random.Random, content: bytes) -> bytes:
    """The same archive with one of its members damaged, or blown up."""
    if draw.random() < 0.3:
        return of_bytes(draw, content)
    members: list[tuple[str, bytes]] = []
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    place = draw.randrange(len(members))
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        for i, (name, data) in enumerate(members):
            way = draw.random() if i == place else 1.0
            if way < 0.1:
                continue
            if way < 0.2:
                data += bytes(1 << 24)
            elif way < 0.9:
                data = of_bytes(draw, data)
            archive.writestr(name, data)
    return written.getvalue()


def of_gzip(draw: random.Random, content: bytes) -> bytes:
    """Other bytes compressed, damaged compression, or a bomb."""
    way = draw.random()
    if way < 0.3:
        return of_bytes(draw, content)
    inner = gzip.decompress(content)
    if way < 0.35:
        return gzip.compress(inner[:8] + bytes(1 << 26))  # half of it again to a gigabyte by repeating
    if way < 0.4:
        return gzip.compress(inner, 1) + gzip.compress(bytes(1 << 26), 1) * draw.choice((1, 16))
    return gzip.compress(of_bytes(draw, inner), 1)


def of_log(draw: random.Random, content: bytes) -> bytes:
    """A file of JSON lines, one of them another."""
    lines = content.rstrip(b"\n").split(b"\n")
    place = draw.randrange(len(lines))
    lines[place] = of_json(draw, lines[place])
    return b"\n".join(lines)


def of_text(draw: random.Random, content: bytes) -> bytes:
    """Lines lost, doubled or exchanged; fields with other values."""
    if draw.random() < 0.3:
        return of_bytes(draw, content)
    lines = content.decode().split("\n")
    place, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    way = draw.randrange(4)
    if way == 0:
        del lines[place]
    elif way == 1:
        lines[place], lines[other] = lines[other], lines[place]
    else:
        fields = lines[place].split("\t")
        values: Sequence[Any] = (*WORDS, *NUMBERS, *FLOATS, "1\t2")
        fields[draw.randrange(len(fields))] = str(draw.choice(values))
        lines[place] = "\t".join(fields)
    return "\n".join(lines).encode()
