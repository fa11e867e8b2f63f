"""Whole training steps: generators against one with the loss written out, students against a plain loop.

    python -m benchmarks.bench_training [--rounds 5] [--threads 1 2]

Generators: LeNet5, batch 256, the paper's objective; a step is draw, forward, backward and Adam. The rival
trains one generator with the same networks; only its diversity loss is the B x B x D expression that
KegNet code writes. Loss and gradients of both are compared before anything is timed.

Students: LeNet5 with the paper's ranks for S1 on 32,000 samples, batch 128, eight passes as in MNIST's table.
The rival does what such scripts do: a DataLoader over the samples, three convolutions in a row, the teacher
in every step. It is shown by itself, and as a protocol has it that picks the best epoch: before each the
samples are read from their file, after it comes the accuracy on 10,000 images, each opened, resized and
normalized by PIL. kegfast is `distill` on a `Pool` with all that it does besides its steps.
"""

import argparse
import copy
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.common import write_results
from kegfast import compress, distill
from kegfast._util.timing import interleaved
from kegfast.distillation import Pool
from kegfast.extraction import RECIPES, Decoder, FrozenTeacher, GeneratorObjective, Generators, Step
from kegfast.extraction import terms as extraction_terms
from kegfast.extraction.procedural import DeadLeaves
from kegfast.functional import diversity_loss
from kegfast.models import LeNet5

SHAPE, CLASSES, BATCH, NOISE, COPIES = (1, 32, 32), 10, 256, 10, 5
POOL, STUDENT_BATCH, EPOCHS, TEST = 32_000, 128, 8, 10_000
MEAN, STD = 0.1307, 0.3081


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    generators, students = [], []
    for threads in args.threads:
        torch.set_num_threads(threads)
        generators += [{"threads": threads, **row} for row in measure_generators(args.rounds)]
        students += [{"threads": threads, **measure_students(max(1, args.rounds // 2))}]
    for row in generators + students:
        print("  ".join(f"{name} {value:.2f}" for name, value in row.items()))
    write_results("training", {"unit": "seconds", "generators": generators, "students": students})


def written_out(noise: Tensor, samples: Tensor) -> Tensor:
    """The diversity loss as its formula reads: every pair's distance in memory."""
    x = samples.flatten(1)
    between_samples = (x[:, None] - x[None]).abs().mean(-1)
    between_noises = (noise[:, None] - noise[None]).square().mean(-1)
    return (-(between_samples * between_noises).mean()).exp()


def make_step(copies: int, loss: Any) -> Any:
    """A training step whose diversity term is `loss`."""
    torch.manual_seed(0)
    network = Generators(copies, CLASSES, SHAPE, NOISE).network.to(memory_format=torch.channels_last).train()
    recipe = RECIPES["paper"]
    objective = GeneratorObjective(
        network, Decoder(copies, SHAPE, NOISE), FrozenTeacher(LeNet5(), watch=False), recipe.terms()
    )
    step = Step(objective, recipe, CLASSES, NOISE, copies)

    def call(i: int = 0) -> Any:
        extraction_terms.diversity_loss, kept = loss, extraction_terms.diversity_loss
        try:
            return step(i)
        finally:
            extraction_terms.diversity_loss = kept

    call.step = step
    return call


def measure_generators(rounds: int) -> list[dict[str, float]]:
    """Seconds per step and generator, alone and together, over those of the rival."""
    rival, alone = make_step(1, written_out), make_step(1, diversity_loss)
    together = make_step(COPIES, diversity_loss)
    check_same(rival, alone)
    seconds = interleaved({"rival": rival, "alone": alone, "together": together}, rounds)
    return [
        {"copies": n, "rival": seconds["rival"], "kegfast": seconds[name] / n,
         "rival / kegfast": seconds["rival"] / (seconds[name] / n)}
        for n, name in ((1, "alone"), (COPIES, "together"))
    ]  # fmt: skip


def check_same(rival: Any, ours: Any) -> None:
    """Raise unless both take the same first step."""
    found = []
    for call in (rival, ours):
        torch.manual_seed(1)
        loss = call()["loss"]
        found.append([loss, *(p.grad for p in call.step.optimizer.param_groups[0]["params"])])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


class Opened(Dataset):
    """Images that are decoded, resized and normalized one by one, as torchvision's transforms do."""

    def __init__(self, n: int):
        self.images = np.random.default_rng(0).integers(0, 256, (n, 28, 28), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images[i]).resize((32, 32), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).div_(255)
        return pixels.sub_(MEAN).div_(STD)[None], i % CLASSES


def measure_students(rounds: int) -> dict[str, float]:
    """Steps a second of kegfast, of the plain loop, and of that loop with all that belongs to its epochs."""
    torch.manual_seed(0)
    teacher = LeNet5().eval()
    fused = compress(teacher, {"conv3": (7, 11)})[0].to(memory_format=torch.channels_last)
    plain = copy.deepcopy(fused).to(memory_format=torch.contiguous_format)
    plain.conv3 = fused.conv3.to_sequential()
    pool = Pool(DeadLeaves(SHAPE, MEAN, STD), POOL)
    torch.testing.assert_close(fused(pool.samples[:64]), plain(pool.samples[:64]), rtol=1e-3, atol=1e-3)
    steps = EPOCHS * (POOL // STUDENT_BATCH)
    opened = DataLoader(Opened(TEST), STUDENT_BATCH)
    times: dict[str, list[float]] = {"kegfast": [], "loop": [], "loop with its epochs": []}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "samples.pt"
        torch.save(pool.samples, file)
        for _ in range(rounds):
            pool._answers = None  # the teacher is asked in every run
            start = time.perf_counter()
            distill(fused, teacher, pool, steps=steps, batch_size=STUDENT_BATCH, temperature=1.0)
            times["kegfast"].append(time.perf_counter() - start)
            training, rest = plain_loop(plain, teacher, file, opened)
            times["loop"].append(training)
            times["loop with its epochs"].append(training + rest)
    rates = {name: steps / median(seconds) for name, seconds in times.items()}
    rivals = [name for name in rates if name != "kegfast"]
    return rates | {f"kegfast / {name}": rates["kegfast"] / rates[name] for name in rivals}


def plain_loop(student: nn.Module, teacher: nn.Module, file: Path, opened: DataLoader) -> tuple[float, float]:
    """Seconds of the steps, and of reading the samples before each epoch and evaluating after it."""
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    training = rest = 0.0
    for _ in range(EPOCHS):
        start = time.perf_counter()
        samples = torch.load(file, weights_only=True)
        data = DataLoader(TensorDataset(samples), STUDENT_BATCH, shuffle=True, drop_last=True)
        read = time.perf_counter()
        student.train()
        for (samples,) in data:
            with torch.no_grad():
                answers = teacher(samples).softmax(1)
            loss = F.kl_div(student(samples).log_softmax(1), answers, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        taught = time.perf_counter()
        student.eval()
        with torch.no_grad():
            for samples, labels in opened:
                (student(samples).argmax(1) == labels).sum().item()
        training += taught - read
        rest += read - start + time.perf_counter() - taught
    return training, rest


if __name__ == "__main__":
    main()
