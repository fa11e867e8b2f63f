"""Reads damaged files of one kind after the other, each kind in a process with little memory and time.

    python -m fuzz.reading FOLDER SEED COUNT KIND...

prints one line of JSON for each kind: how many files were read, refused and, in words, what went wrong. What
must come of a damaged file is a value or a ValueError, TypeError or OSError that says so: anything else, a
call of another program, a signal or a file that takes longer than `SECONDS` is a failure, and the file stays
in FOLDER.
"""

import gzip
import json
import os
import random
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fuzz import damage
from torch import nn

import kegfast
from kegfast._util.files import load_weights, read_json, read_state_dict, save_tensors, write_json
from kegfast.cli.config import with_defaults
from kegfast.compression.interop import from_state_dict
from kegfast.data import formats
from kegfast.dispatch import cache, cpu
from kegfast.training.loop import MetricsLog, run_steps

SECONDS = 20
BYTES = 768 << 20
"""Of memory, above what the process has when it starts to read."""
REFUSALS = (ValueError, TypeError, OSError)
WORDS = ("must", "expected")
"""One of them stands in every refusal."""
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess",
    "socket",
    "pty",
    "ctypes.dlopen",
)


class Kind(NamedTuple):
    """A kind of file: what writes a whole one, damages it, and reads it."""

    suffix: str
    write: Callable[[Path], Any]
    damage: Callable[[random.Random, bytes], bytes]
    read: Callable[[Path], Any]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers).eval()


def compressed() -> nn.Module:
    model = network()
    model[0] = kegfast.nn.TuckerConv2d(1, 4, 3, (1, 2))
    return model


def write_run(path: Path, resume: bool = False) -> None:
    """A run of three steps, of which the file keeps the state; read, it goes on."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())

    def step(i: int) -> dict[str, torch.Tensor]:
        loss = model(torch.randn(4, 3)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    run_steps(step, 3, state={"model": model, "optimizer": optimizer}, checkpoint=path, resume=resume)


def resume(path: Path) -> None:
    """The run from the file, which may also end in what training may end in."""
    with suppress(FloatingPointError):
        write_run(path, resume=True)


def write_log(path: Path) -> None:
    log = MetricsLog(path)
    for step in range(5):
        log.write("train", step, 0.1, {"loss": 1.0})


def read_log(path: Path) -> None:
    MetricsLog(path).rewind("train", 3)
    MetricsLog(path).read()


def write_idx(path: Path) -> None:
    header = b"\x00\x00\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (5, 4, 4))
    path.write_bytes(gzip.compress(header + bytes(range(80))))


def write_mat(path: Path) -> None:
    from scipy.io import savemat

    content = {"X": np.zeros((4, 4, 3, 6), np.uint8), "y": np.arange(1, 7, dtype=np.uint8)[:, None]}
    savemat(path, content, do_compression=True)


def write_table(path: Path) -> None:
    rows = ["\tf1\tf2\tclase"] + [f"{i}\t{i * 0.5}\t{-i}\t{i % 3}" for i in range(8)]
    path.write_text("\n".join(rows) + "\n")


def write_options(path: Path) -> None:
    write_json(path, {"steps": 5, "lr": 0.1, "pool": [3, 4], "resume": True, "label": "x"})


def read_options(path: Path) -> None:
    with_defaults(["train", "--resume", "--out", str(path.parent)])


KINDS = {
    "model": Kind(
        ".safetensors", lambda p: kegfast.save(compressed(), p), damage.of_safetensors, kegfast.load
    ),
    "layer": Kind(
        ".safetensors", lambda p: kegfast.save(compressed()[0], p), damage.of_safetensors, kegfast.load
    ),
    "model for an architecture": Kind(
        ".safetensors",
        lambda p: kegfast.save(compressed(), p),
        damage.of_safetensors,
        lambda p: kegfast.load(p, network()),
    ),
    "generators": Kind(
        ".safetensors",
        lambda p: kegfast.Generators(2, 3, (1, 8, 8), input_range=(-1.0, 1.0)).save(p),
        damage.of_safetensors,
        lambda p: kegfast.Generators.load(p).sample(4),
    ),
    "weights": Kind(
        ".safetensors",
        lambda p: save_tensors(p, network().state_dict()),
        damage.of_safetensors,
        lambda p: load_weights(network(), p),
    ),
    "state dict": Kind(
        ".pt",
        lambda p: torch.save({"model_state": network().state_dict(), "epoch": 3}, p),
        damage.of_torch,
        lambda p: load_weights(network(), p),
    ),
    "factors": Kind(
        ".pt",
        lambda p: torch.save(compressed().state_dict(), p),
        damage.of_torch,
        lambda p: from_state_dict(network(), read_state_dict(p)),
    ),
    "checkpoint": Kind(".pt", write_run, damage.of_torch, resume),
    "metrics": Kind(".jsonl", write_log, damage.of_log, read_log),
    "json": Kind(".json", lambda p: write_json(p, {"a": [1, {"b": None}]}), damage.of_json, read_json),
    "options": Kind(".json", write_options, damage.of_json, read_options),
    "choices": Kind(
        ".json",
        lambda p: cache.write_choices(p, {" ".join("3" * 17): "direct"}),
        damage.of_json,
        cpu.read_table,
    ),
    "packaged table": Kind(
        ".json", lambda p: p.write_bytes(cpu.PACKAGED.read_bytes()[:]), damage.of_json, cpu.read_packaged
    ),
    "idx": Kind(".gz", write_idx, damage.of_gzip, formats.read_idx),
    "npz": Kind(
        ".npz", lambda p: np.savez(p, x=np.eye(5), y=np.arange(3)), damage.of_zip, formats.read_arrays
    ),
    "table": Kind(".dat", write_table, damage.of_text, formats.read_table),
    "mat": Kind(".mat", write_mat, damage.of_bytes, formats.read_mat),
}


def run(name: str, folder: Path, seed: int, count: int) -> dict[str, Any]:
    """Damages and reads one kind of file, `count` times."""
    kind = KINDS[name]
    # Options are read from a file of that name.
    path = folder / (f"options{kind.suffix}" if name == "options" else f"file{kind.suffix}")
    kind.write(path)
    whole = path.read_bytes()
    kind.read(path)  # what it imports and allocates once is no file's doing
    called: list[str] = []
    sys.addaudithook(lambda event, _: called.append(event) if event.startswith(FORBIDDEN) else None)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
    refused, failures = 0, []
    for number in range(count):
        draw = random.Random(f"{name} {seed} {number}")
        path.write_bytes(kind.damage(draw, whole))
        (folder / "case").write_text(f"{name}, seed {seed}, case {number}")
        called.clear()
        signal.alarm(SECONDS)
        wrong = None
        try:
            kind.read(path)
        except REFUSALS as error:
            refused += 1
            if not any(word in str(error) for word in WORDS) and not isinstance(error, OSError):
                wrong = "".join(traceback.format_exception(error)[-3:])
        except BaseException as error:
            wrong = "".join(traceback.format_exception(error)[-3:])
        signal.alarm(0)
        if called or wrong:
            kept = folder / f"case {number}{kind.suffix}"
            path.rename(kept)
            failures.append(f"case {number} ({kept}): {wrong or called}")
    return {"kind": name, "cases": count, "refused": refused, "failures": failures}


def main() -> None:
    base, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    for name in sys.argv[4:] or KINDS:
        folder = base / name
        folder.mkdir(parents=True)
        child = os.fork()
        if child == 0:
            print(json.dumps(run(name, folder, seed, count)), flush=True)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            case = (
                (folder / "case").read_text()
                if (folder / "case").exists()
                else f"{name}, before the first case"
            )
            what = "hangs" if code == -signal.SIGALRM else f"ends the process with {code}"
            print(
                json.dumps({"kind": name, "cases": 0, "refused": 0, "failures": [f"{case}: {what}"]}),
                flush=True,
            )


if __name__ == "__main__":
    main()
