"""The diversity loss, forward and backward through autograd, against every other way to compute it.

    python -m benchmarks.bench_diversity [--case l1-256x1024 ...] [--rounds N]
    python -m pytest benchmarks/bench_diversity.py --benchmark-enable     (ours alone, quick)

eager: the authors' form, B x B x D. cdist: torch.cdist for both distances. compile: eager, compiled.
low rank: the closed form in plain torch. keops: symbolic pairs, where pykeops is installed. Every result is
compared with float64 before it is timed. Results of earlier cases on such a machine stay in
results/diversity.json; `python -m benchmarks.tables` makes the table.
Shares of the machine's peaks are those of the operator alone, warm, one thread.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import common
from kegfast._util.machine import measured
from kegfast._util.timing import interleaved
from kegfast.functional import diversity_loss
from kegfast.ops.diversity import METRICS, NOISE_METRICS

WIDTH = 10  # of the noises
SORTED_FROM = 56  # batch from which l1 under squared noise distances sorts, at this width
Loss = Callable[["Case", Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One line of the table: what is computed, against whom, and the least ratios that are asked for."""

    metric: str
    batch: int
    features: int
    goals: dict[str, float] = field(default_factory=dict)
    noise_metric: str = "sqeuclidean"
    rivals: tuple[str, ...] = ("cdist",)

    @property
    def name(self) -> str:
        unsquared = "-norms" if self.noise_metric == "euclidean" else ""
        return f"{self.metric}{unsquared}-{self.batch}x{self.features}"


ALL = ("cdist", "eager", "compile", "keops")
SQUARE = ("cdist", "low rank")
CASES = [
    Case("l1", 32, 1024, {"cdist": 12}, rivals=ALL),
    Case("l1", 64, 1024, {"cdist": 18}, rivals=ALL),
    Case("l1", 256, 1024, {"cdist": 70, "eager": 600, "compile": 180}, rivals=ALL),
    Case("l1", 256, 3072, {"cdist": 85}),
    Case("l1", 1024, 3072, {"cdist": 550}),
    Case("sqeuclidean", 256, 1024, {"cdist": 12}, rivals=SQUARE),
    Case("sqeuclidean", 1024, 1024, {"cdist": 22}, rivals=SQUARE),
    Case("l1", 256, 1024, {"cdist": 45}, "euclidean"),
    Case("l1", 1024, 1024, {"cdist": 100}, "euclidean"),
    Case("l1", 4096, 3072, rivals=()),
]


def eager(case: Case, z: Tensor, x: Tensor) -> Tensor:
    """The authors' form."""
    w, d = z[:, None] - z[None], x[:, None] - x[None]
    w = w.square().mean(2) if case.noise_metric == "sqeuclidean" else w.norm(dim=2)
    d = d.abs().mean(2) if case.metric == "l1" else d.square().mean(2)
    return torch.exp(torch.mean(-w * d))


def cdist(case: Case, z: Tensor, x: Tensor) -> Tensor:
    """Both distances by torch.cdist."""
    w = torch.cdist(z, z)
    if case.noise_metric == "sqeuclidean":
        w = w.square() / z.shape[1]
    d = torch.cdist(x, x, p=1) if case.metric == "l1" else torch.cdist(x, x).square()
    return torch.exp(-(w * d).mean() / x.shape[1])


def low_rank(case: Case, z: Tensor, x: Tensor) -> Tensor:
    """The closed form for squared distances in plain torch."""
    z, x = z - z.mean(0), x - x.mean(0)
    a, b, n = z.square().sum(1), x.square().sum(1), len(z)
    total = 2 * n * (a @ b) + 2 * a.sum() * b.sum() + 4 * (z.T @ x).square().sum()
    return torch.exp(-total / (n * n * z.shape[1] * x.shape[1]))


def keops(case: Case, z: Tensor, x: Tensor) -> Tensor:
    """Symbolic pairs."""
    from pykeops.torch import LazyTensor

    def difference(t: Tensor):
        return LazyTensor(t[:, None]) - LazyTensor(t[None])

    w = (difference(z) ** 2).sum(-1) / z.shape[1]
    d = difference(x).abs().sum(-1) / x.shape[1]
    return torch.exp(-(w * d).sum(1).sum() / len(z) ** 2)


def kegfast_loss(case: Case, z: Tensor, x: Tensor) -> Tensor:
    """Ours."""
    return diversity_loss(z, x, metric=case.metric, noise_metric=case.noise_metric)


def has_keops() -> bool:
    """Whether the optional rival is there."""
    try:
        import pykeops.torch  # noqa: F401
    except ImportError:
        return False
    return True


def rival(name: str) -> Loss:
    """A way to compute the loss, by its name in the table."""
    if name == "compile":
        torch._dynamo.reset()
        return torch.compile(eager, dynamic=False)
    return {"eager": eager, "cdist": cdist, "low rank": low_rank, "keops": keops}[name]


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Noises and samples, both standard normal."""
    torch.manual_seed(0)
    return torch.randn(case.batch, WIDTH), torch.randn(case.batch, case.features).requires_grad_()


def step(
    loss: Callable[[Case, Tensor, Tensor], Tensor], case: Case, z: Tensor, x: Tensor
) -> Callable[[], Tensor]:
    """Forward and backward; the gradient."""
    return lambda: torch.autograd.grad(loss(case, z, x), x)[0]


def operator(case: Case, z: Tensor, x: Tensor) -> Callable[[], object]:
    """The compiled operator without autograd around it."""
    numbers = METRICS[case.metric], NOISE_METRICS[case.noise_metric]
    return lambda: torch.ops.kegfast.diversity_loss(z, x, *numbers, 1.0, False, False, True)


def exact_columns(case: Case, z: Tensor, x: Tensor, columns: int = 4) -> Tensor:
    """The first columns of d log(loss) / dx in float64, which no other column enters, row by row."""
    z, part = z.double(), x.detach()[:, :columns].double()
    rows = []
    for noise, sample in zip(z, part, strict=True):
        square = (noise - z).square()
        weights = square.mean(1) if case.noise_metric == "sqeuclidean" else square.sum(1).sqrt()
        delta = sample - part
        rows.append(weights @ (delta.sign() if case.metric == "l1" else 2 * delta))
    return torch.stack(rows) * (-2 / (case.batch**2 * case.features))


def verify(case: Case, steps: dict[str, Callable[[], Tensor]], z: Tensor, x: Tensor) -> dict[str, float]:
    """Each variant's gradient error as a share of the largest entry; raises where it is wrong."""
    exact = exact_columns(case, z, x)
    errors = {}
    for name, run in steps.items():
        gradient = run()[:, :4].double()
        if exact is None:
            exact = (
                gradient  # too large for the float64 definition: the variants are compared with each other
            )
        scaled = (
            gradient * (exact.flatten() @ gradient.flatten()) / gradient.square().sum()
        )  # drop the factor loss
        errors[name] = ((scaled - exact).abs().max() / exact.abs().max()).item()
        if not errors[name] <= 1e-4:
            raise AssertionError(f"{case.name}: {name} is off by {errors[name]:.1e}")
    return errors


def measure(case: Case, rounds: int) -> dict:
    """Times of all variants, cold and warm, one thread; ours on two threads; memory."""
    z, x = inputs(case)
    names = [name for name in case.rivals if name != "keops" or has_keops()]
    steps = {"kegfast": step(kegfast_loss, case, z, x)}
    steps |= {name: step(rival(name), case, z, x) for name in names}
    torch.set_num_threads(1)
    errors = verify(case, steps, z, x)
    cold = interleaved(steps, rounds)
    ours = {"kegfast": steps["kegfast"]}
    warm = interleaved(ours, 10 * rounds, warm=True)["kegfast"]
    alone = interleaved({"operator": operator(case, z, x.detach())}, 10 * rounds, warm=True)["operator"]
    torch.set_num_threads(2)
    two = interleaved(ours, 10 * rounds, warm=True)["kegfast"]
    torch.set_num_threads(1)
    return {
        "seconds": cold,
        "ratios": {name: cold[name] / cold["kegfast"] for name in names},
        "goals": case.goals,
        "gradient_errors": errors,
        "warm_seconds": warm,
        "two_thread_speedup": warm / two,
        "workspace_bytes": workspace(case),
        "operator_seconds": alone,
        **limits(case, alone),
    }


def vector_instructions(case: Case) -> float | None:
    """Vector arithmetic of the l1 kernels (AVX-512: 16 features an instruction), counted from their loops."""
    if case.metric != "l1":
        return None
    n = 16
    while n < case.batch:
        n *= 2
    levels = n.bit_length() - 1
    network = 2 * (63 * n // 16 + n // 2 * sum(range(5, levels + 1)))
    rows = 14 * case.batch  # loading, keys, ties, finishing
    if case.noise_metric == "sqeuclidean" and case.batch >= SORTED_FROM:
        tile = network + rows + case.batch * 16 * (2 + 45 / 16)  # product, sum, tree of 15 folds of 3
    else:
        tile = network + rows + 3 * case.batch * (case.batch - 1) / 2
    return tile * case.features / 16


def limits(case: Case, seconds: float) -> dict[str, float]:
    """Shares of the machine's peaks: vector instructions issued, and memory traffic."""
    shares = {"bandwidth_share": 3 * 4 * case.batch * case.features / seconds / common.bandwidth()}
    instructions = vector_instructions(case)
    if instructions:
        shares["vector_share"] = instructions / seconds / common.vector_issue_rate()
    return shares


def workspace(case: Case) -> int:
    """Bytes by which the peak of a fresh process grows in one step, beyond the gradient."""
    command = [sys.executable, "-m", "benchmarks.bench_diversity", "--peak", case.name]
    peak = int(subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, check=True).stdout)
    return peak - 4 * case.batch * case.features


def peak_growth(case: Case) -> int:
    """In this process: growth of the largest resident size over one step, after a small one."""
    torch.set_num_threads(1)
    small = Case(case.metric, 80, 32, noise_metric=case.noise_metric)
    step(kegfast_loss, small, *inputs(small))()
    z, x = inputs(case)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = high_water()
    step(kegfast_loss, case, z, x)()
    return high_water() - before


def high_water() -> int:
    """The largest resident size of this process so far, in bytes (Linux)."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def has_rival(results: dict[str, dict], name: str) -> bool:
    """Whether any case was measured against it."""
    return any(name in r["seconds"] for r in results.values())


def table(results: dict[str, dict]) -> str:
    """The table of the documents."""
    columns = [n for n in ("eager", "compile", "cdist", "low rank", "keops") if has_rival(results, n)]
    rows = []
    for name, r in results.items():
        seconds = r["seconds"]
        rivals = (f"{seconds[n] * 1e3:.2f}" if n in seconds else "" for n in columns)
        ratio = f"{r['ratios']['cdist']:.0f}x" if "cdist" in r["ratios"] else ""
        ours, error = f"{seconds['kegfast'] * 1e3:.2f}", f"{r['gradient_errors']['kegfast']:.0e}"
        rows.append((name, *rivals, ours, ratio, error))
    headers = ("case (ms)", *columns, "kegfast", "cdist / kegfast", "gradient error")
    return common.markdown_table(headers, rows)


def goals(results: dict[str, dict]) -> str:
    """Every goal and whether it is met."""
    rows = []
    for name, r in results.items():
        for other, goal in r["goals"].items():
            got = r["ratios"][other]
            rows.append((name, f"{other} >= {goal}", f"{got:.1f}", "pass" if got >= goal else "falls short"))
        if name == "l1-1024x3072":
            got = r["workspace_bytes"] / 1e6
            rows.append((name, "workspace < 2 MB", f"{got:.2f}", "pass" if got < 2 else "falls short"))
        batch, features = map(int, name.split("-")[-1].split("x"))
        if name == "l1-4096x3072":
            got = (r["workspace_bytes"] + 4 * batch * features) / 1e6  # with the gradient
            rows.append((name, "peak < 100 MB", f"{got:.1f}", "pass" if got < 100 else "falls short"))
        if batch * features >= 256 * 1024:
            got = r["two_thread_speedup"]
            rows.append((name, "two threads >= 1.7", f"{got:.2f}", "pass" if got >= 1.7 else "falls short"))
        if "vector_share" in r:
            got, goal = r["vector_share"], 0.75 if "norms" not in name and batch >= SORTED_FROM else 0.85
            text = "pass" if got >= goal else "falls short"
            rows.append((name, f"issue peak >= {goal:.0%}", f"{got:.0%}", text))
    return common.markdown_table(("case", "goal", "measured", ""), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    by_name = {case.name: case for case in CASES}
    parser.add_argument("--case", nargs="*", choices=list(by_name), default=list(by_name))
    parser.add_argument("--rounds", type=int, help="turns of each variant; else by size")
    parser.add_argument("--peak", choices=list(by_name), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(peak_growth(by_name[args.peak]))
        return
    known = common.earlier_results("diversity").get("cases", {})
    for name in args.case:
        case = by_name[name]
        rounds = args.rounds or max(3, min(31, 2**23 // (case.batch * case.batch * case.features // 64)))
        known[name] = measure(case, rounds) | {"measured": measured()}
    results = {name: known[name] for name in by_name if name in known}
    common.write_results("diversity", {"noise_width": WIDTH, "threads": 1, "cases": results})
    print(table(results))
    print(goals(results))


@pytest.mark.parametrize("case", CASES[:4] + CASES[5:8], ids=lambda case: case.name)
def test_step(benchmark, case: Case) -> None:
    """One forward and backward pass of ours."""
    torch.set_num_threads(1)
    benchmark(step(kegfast_loss, case, *inputs(case)))


if __name__ == "__main__":
    main()
