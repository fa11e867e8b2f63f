"""Kills runs at random moments, resumes them until they end, and compares that with an undisturbed run.

    python -m fuzz.runs FOLDER SEED KILLS KIND...

prints one line of JSON for each kind of run: how often it was killed while it ran, and whether the student,
the history and the log of metrics are those of a run that nobody killed, to the last bit.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small_models import convolutional, perceptron
from torch.utils.data import TensorDataset

import kegfast
from kegfast._util.files import digest
from kegfast.distillation import GaussianNoise, Mixture
from kegfast.recovery.front import recovery
from kegfast.training import loop

RESULT = "result.json"
ATTEMPTS = 60


def options(folder: Path) -> dict[str, Any]:
    log = loop.MetricsLog(folder / "metrics.jsonl")
    return {"checkpoint": folder / "run.pt", "resume": True, "metrics": log}


def train(folder: Path) -> Any:
    model = perceptron(8, 32, 4)
    draws = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(500, 8, generator=draws), torch.randint(4, (500,), generator=draws))
    history = kegfast.train(model, data, steps=400, batch_size=32, log_every=7, **options(folder))
    return model.state_dict(), history


def extract(folder: Path) -> Any:
    teacher = convolutional(4, seed=1).eval()
    sizes = {"num_classes": 3, "sample_shape": (1, 9, 9), "generators": 2, "batch_size": 8}
    made = kegfast.extract(teacher, steps=40, **sizes, **options(folder))
    return made.network.state_dict(), made.history


def distill(folder: Path) -> Any:
    teacher, student = convolutional(6, seed=1), convolutional(4)
    source = Mixture([GaussianNoise((1, 9, 9)), kegfast.Generators(1, 3, (1, 9, 9))])
    history = kegfast.distill(
        student, teacher, source, loss="soft_target+hint@3", steps=150, batch_size=8, **options(folder)
    )
    return student.state_dict(), history


def shrink(folder: Path) -> Any:
    model = perceptron(12, 32, 32, 4, seed=1)
    out = folder / "out"
    with recovery(model, (12,), ratio=2.0, out=out, resume=out.exists(), share=0.01) as run:
        return run.student().state_dict()


RUNS: dict[str, Callable[[Path], Any]] = {run.__name__: run for run in (train, extract, distill, shrink)}


def start(name: str, folder: Path) -> int:
    """A process in which a run goes on, and leaves its result."""
    child = os.fork()
    if child:
        return child
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = digest(RUNS[name](folder)).hex()
        lines = loop.MetricsLog(folder / "metrics.jsonl").read()
        told = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
        (folder / RESULT).write_text(json.dumps([found, told]))
        os._exit(0)
    except BaseException as error:
        print(f"{name}: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(name: str, folder: Path, draw: random.Random, kills: int, seconds: float) -> int:
    """Kills a run so many times, or until it ends; then lets it end. How often it was killed."""
    count = 0
    for _ in range(ATTEMPTS):
        if count == kills or (folder / RESULT).exists():
            break
        child = start(name, folder)
        time.sleep(draw.uniform(0.0, 0.7 * seconds))
        os.kill(child, signal.SIGKILL)
        count += end(child) == -signal.SIGKILL
    if not (folder / RESULT).exists() and (code := end(start(name, folder))) != 0:
        raise RuntimeError(f"{name} ended with {code} after {count} kills")
    return count


def main() -> None:
    home, seed, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    loop.CHECKPOINT_SECONDS = 0.02
    draw = random.Random(seed)
    for name in sys.argv[4:] or RUNS:
        before = time.monotonic()
        assert end(start(name, home / name / "whole")) == 0
        seconds = time.monotonic() - before
        count = killed(name, home / name / "parts", draw, kills, seconds)
        whole, parts = (json.loads((home / name / run / RESULT).read_text()) for run in ("whole", "parts"))
        print(
            json.dumps({"kind": name, "kills": count, "same": whole == parts, "seconds": seconds}), flush=True
        )


if __name__ == "__main__":
    main()
