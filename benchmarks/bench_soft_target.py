"""The fused soft-target loss, forward and backward, against torch's own operators.

    python -m benchmarks.bench_soft_target [--threads 1]

torch: log_softmax of both, kl_div with log_target, autograd. compiled: that under torch.compile. copy: one
elementwise sum of two (B, C) tensors into a third, the least traffic that a fused kernel could have. The
results are compared before anything is timed; the variants take turns, and medians are reported.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import write_results
from kegfast import functional
from kegfast._util.timing import interleaved
from kegfast.ops import reference

SHAPES = [(256, 10), (256, 100), (256, 1_000), (128, 10_000), (64, 100_000)]
TEMPERATURE = 4.0
ROUNDS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [measure(*shape) for shape in SHAPES]
    for row in rows:
        print("  ".join(f"{name} {value:10.1f}" for name, value in row.items()))
    write_results("soft_target", {"unit": "microseconds", "threads": args.threads, "rows": rows})


def measure(batch: int, classes: int) -> dict[str, float]:
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, batch, classes)
    student.requires_grad_()
    target = torch.empty_like(teacher)
    compiled = torch.compile(reference.soft_target, fullgraph=True, dynamic=False)
    variants = {
        "fused": lambda: gradient(functional.soft_target, student, teacher),
        "torch": lambda: gradient(reference.soft_target, student, teacher),
        "compiled": lambda: gradient(compiled, student, teacher),
    }
    exact = gradient(reference.soft_target, student.detach().double().requires_grad_(), teacher.double())
    for name, run in variants.items():
        error = (run().double() - exact).abs().max() / exact.abs().max()
        if error > 1e-5:
            raise AssertionError(f"{name}: relative error {error:.1e} at {batch} x {classes}")
    variants["copy"] = lambda: torch.add(student.detach(), teacher, out=target)
    medians = {name: 1e6 * seconds for name, seconds in interleaved(variants, ROUNDS).items()}
    ratio = medians["torch"] / medians["fused"]
    return {"batch": batch, "classes": classes, **medians, "torch / fused": ratio}


def gradient(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    return torch.autograd.grad(loss(student, teacher, TEMPERATURE), student)[0]


if __name__ == "__main__":
    main()
