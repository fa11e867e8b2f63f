"""Both operators on a CUDA device against everything a user could run instead; one call, under eight minutes.

`python -m benchmarks.bench_cuda` prints the goals with "pass" or "falls short" and writes
benchmarks/results/cuda-<device>.json. Every contender is verified in the same process before it is
timed. Times are medians of interleaved rounds: eager by events around calls that rotate over inputs
larger than L2 together, and as a CUDA graph of such calls.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_tucker2 import Shape, shapes
from benchmarks.common import write_results
from kegfast import build_info, functional, reference
from kegfast.models import LeNet5

BUDGET_S = 420  # the last parts are left out, and named, where time runs short
DIVERSITY_GOALS_MS = {256: 0.020, 1024: 0.090, 4096: 0.5, 16384: 2.5}
CDIST_GOALS = {256: 40, 1024: 100}

Run = Callable[[int], object]  # one call on input set i


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def sets_beyond_l2(bytes_per_set: int) -> int:
    """Input sets that together are three times as large as the L2 cache."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, math.ceil(3 * l2 / max(bytes_per_set, 1))))


def timed(contenders: dict[str, Run], sets: int, rounds: int = 9) -> dict[str, dict[str, float]]:
    """Per contender, milliseconds a call: eager and (where it can be captured) as a graph."""
    calls = {name: max(4, min(50, 8 * sets)) for name in contenders}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, run in contenders.items():
        for i in range(sets):
            run(i)
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for i in range(calls[name]):
                    run(i % sets)
            graphs[name] = graph
        except RuntimeError:  # what allocates in backward or synchronises stays eager
            torch.cuda.synchronize()
    eager: dict[str, list[float]] = {name: [] for name in contenders}
    replayed: dict[str, list[float]] = {name: [] for name in graphs}

    def clock(body: Callable[[], None], count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        body()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count

    for _ in range(rounds):
        for name, run in contenders.items():
            eager[name].append(
                clock(lambda n=name, r=run: [r(i % sets) for i in range(calls[n])], calls[name])
            )
        for name, graph in graphs.items():
            replayed[name].append(clock(graph.replay, calls[name]))
    return {
        name: {"eager_ms": median(eager[name])}
        | ({"graph_ms": median(replayed[name])} if name in replayed else {})
        for name in contenders
    }


def ceilings() -> dict[str, float]:
    """Measured once: bytes a second of a large copy, FLOP a second of large products."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    copy = timed({"copy": lambda i, a=a, b=b: b.copy_(a)}, 1)["copy"]["eager_ms"]
    result = {"copy_bytes_per_s": 2 * a.numel() / copy * 1e3}
    del a, b
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(8192, 8192, device="cuda").to(dtype)
        y = torch.randn(8192, 8192, device="cuda").to(dtype)
        ms = timed({"product": lambda i, x=x, y=y: x @ y}, 1, rounds=5)["product"]["eager_ms"]
        result[f"matmul_{dtype}_flop_per_s".replace("torch.", "")] = 2 * 8192**3 / ms * 1e3
    return result


# ---- diversity -------------------------------------------------------------------------------------


def eager_exponent(noises: Tensor, samples: Tensor) -> Tensor:
    return reference.diversity_exponent(noises, samples, "l1", "sqeuclidean")


def cdist_exponent(noises: Tensor, samples: Tensor) -> Tensor:
    weights = torch.cdist(noises, noises).square() / noises.shape[1]
    return -(weights * torch.cdist(samples, samples, p=1) / samples.shape[1]).mean()


def diversity_row(batch: int, features: int = 3072) -> dict:
    """Forward and gradient of the l1 loss."""
    sets = sets_beyond_l2(8 * batch * features)
    noises = [torch.randn(batch, 10, device="cuda") for _ in range(sets)]
    samples = [torch.randn(batch, features, device="cuda", requires_grad=True) for _ in range(sets)]

    def autograd(exponent: Callable[[Tensor, Tensor], Tensor]) -> Run:
        return lambda i: torch.autograd.grad(exponent(noises[i], samples[i]), samples[i])

    def ours(i: int) -> tuple[Tensor, ...]:
        return torch.ops.kegfast.diversity_forward(noises[i], samples[i], 0, 0, False, True)

    contenders: dict[str, Run] = {"kegfast": ours}
    contenders["kegfast autograd"] = autograd(lambda z, x: functional.diversity_loss(z, x, log=True))
    pairs_bytes = 4.0 * batch * batch * features
    free = torch.cuda.mem_get_info()[0]
    if pairs_bytes * 3 < free:
        contenders["eager"] = autograd(eager_exponent)
        contenders["torch.compile"] = autograd(
            torch.compile(eager_exponent, mode="max-autotune-no-cudagraphs")
        )
    if pairs_bytes * 2 < free:  # its backward allocates batch x batch x features
        contenders["cdist"] = autograd(cdist_exponent)
    exact = None
    if batch <= 1024:
        (exact,) = torch.autograd.grad(cdist_exponent(noises[0], samples[0]), samples[0])
    gradient = ours(0)[2]
    row = {"operator": "diversity l1", "batch": batch, "features": features, "sets": sets}
    if exact is not None:
        row["error_against_cdist"] = error(gradient, exact)
        assert row["error_against_cdist"] < 1e-4
    row["times"] = timed(contenders, sets)
    row["bytes"] = 2 * samples[0].numel() * 4
    return row


# ---- tucker2 ---------------------------------------------------------------------------------------


def tucker2_row(shape: Shape, batch: int, dtype: torch.dtype) -> dict:
    """Inference: the fused operator in each form, and cuDNN's in each layout."""
    c, k, h, (r1, r2) = shape.channels, shape.features, shape.size, shape.ranks
    geometry = tuple((v, v) for v in (shape.stride, shape.padding, 1))
    out = (h + 2 * shape.padding - shape.kernel) // shape.stride + 1
    sets = sets_beyond_l2(batch * (c * h * h + k * out * out) * 2)
    x = [torch.randn(batch, c, h, h, device="cuda", dtype=dtype) for _ in range(sets)]
    xl = [t.contiguous(memory_format=torch.channels_last) for t in x]

    def weight(*size: int) -> Tensor:
        return (torch.randn(*size, device="cuda") / math.prod(size[1:]) ** 0.5).to(dtype)

    weights = weight(r1, c, 1, 1), weight(r2, r1, shape.kernel, shape.kernel), weight(k, r2, 1, 1)
    last_weights = tuple(w.contiguous(memory_format=torch.channels_last) for w in weights)
    dense = weight(k, c, shape.kernel, shape.kernel)
    dense_last = dense.contiguous(memory_format=torch.channels_last)

    def ours(inputs: Sequence[Tensor], number: int) -> Run:
        ints = [n for pair in geometry for n in pair]
        call = torch.ops.kegfast.tucker2_as
        return lambda i: call(inputs[i], *weights, None, *ints, False, number)

    def unfused(inputs: Sequence[Tensor], factors: tuple[Tensor, ...]) -> Run:
        return lambda i: reference.tucker_conv2d(inputs[i], *factors, None, *geometry, None)

    contenders: dict[str, Run] = {
        "kegfast": lambda i: functional.tucker_conv2d(xl[i], *weights, None, *geometry),
        "kegfast fused": ours(xl, 1),
        "kegfast stages": ours(xl, 2),
        "kegfast nchw": ours(x, 0),
        "cudnn": unfused(x, weights),
        "cudnn channels_last": unfused(xl, last_weights),
        "dense": lambda i: F.conv2d(x[i], dense, None, *geometry),
        "dense channels_last": lambda i: F.conv2d(xl[i], dense_last, None, *geometry),
    }
    want = reference.tucker_conv2d(x[0].double(), *(w.double() for w in weights), None, *geometry, None)
    tolerance = 8e-3 if dtype != torch.float32 else 2e-3
    errors = {}
    for name, run in contenders.items():
        if not name.startswith("dense"):
            errors[name] = error(run(0), want)
            assert errors[name] < tolerance, (name, errors[name])
    return {
        "operator": "tucker2",
        "shape": shape.name,
        "batch": batch,
        "dtype": str(dtype),
        "sets": sets,
        "errors": errors,
        "times": timed(contenders, sets),
        "bytes": batch * (c * h * h + k * out * out) * x[0].element_size(),
        "flop": 2 * shape.multiply_adds(batch),
    }


def generator_step_row(batch: int = 256) -> dict:
    """The paper's generator step: a LeNet5 judges samples; cross entropy and diversity; eager and graph."""
    teacher = LeNet5().cuda().eval()
    make = torch.nn.Sequential(torch.nn.Linear(20, 1024), torch.nn.Tanh()).cuda()
    z = torch.randn(batch, 10, device="cuda")
    labels = torch.randint(0, 10, (batch,), device="cuda")
    inputs = torch.cat([F.one_hot(labels, 10).float(), z], 1)

    def step(exponent: Callable[[Tensor, Tensor], Tensor]) -> Run:
        def run(_: int) -> None:
            samples = make(inputs).view(batch, 1, 32, 32)
            loss = F.cross_entropy(teacher(samples), labels) + exponent(z, samples.flatten(1)).exp()
            torch.autograd.grad(loss, make.parameters())

        return run

    ours = step(lambda noises, samples: functional.diversity_loss(noises, samples, log=True))
    return {
        "operator": "generator step",
        "batch": batch,
        "times": timed({"kegfast": ours, "eager": step(eager_exponent)}, 1),
    }


# ---- goals -----------------------------------------------------------------------------------------


def best(times: dict, names: Sequence[str], key: str) -> float:
    return min(times[name][key] for name in names if key in times[name])


def geometric(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")


def goals(rows: list[dict], limits: dict[str, float]) -> list[tuple[str, float, float]]:
    """(goal, reached, wanted), reached over wanted so that 1 and more passes."""
    found = []
    for row in rows:
        if row["operator"] == "diversity l1":
            ms = row["times"]["kegfast"].get("graph_ms", row["times"]["kegfast"]["eager_ms"])
            found.append(
                (
                    f"l1 B={row['batch']} within {DIVERSITY_GOALS_MS[row['batch']]} ms",
                    DIVERSITY_GOALS_MS[row["batch"]] / ms,
                    1,
                )
            )
            if row["batch"] in CDIST_GOALS and "cdist" in row["times"]:
                ratio = row["times"]["cdist"]["eager_ms"] / row["times"]["kegfast autograd"]["eager_ms"]
                found.append((f"l1 B={row['batch']} over cdist", ratio, CDIST_GOALS[row["batch"]]))
        if row["operator"] == "generator step":
            ours = row["times"]["kegfast"].get("graph_ms", row["times"]["kegfast"]["eager_ms"])
            found.append(("generator step, graph over eager", row["times"]["eager"]["eager_ms"] / ours, 10))
    tucker = [row for row in rows if row["operator"] == "tucker2" and row["dtype"] == "torch.bfloat16"]
    cudnn = ("cudnn", "cudnn channels_last")

    def ratios(batch: int, key: str, share: Sequence[int] = (4, 8)) -> list[float]:
        return [
            best(row["times"], cudnn, key) / row["times"]["kegfast"][key]
            for row in tucker
            if row["batch"] == batch
            and row["share"] in share
            and row["family"] == "resnet"
            and key in row["times"]["kegfast"]
        ]

    found.append(
        ("ResNet C/4, C/8, batch 128, over the best cuDNN form", geometric(ratios(128, "graph_ms")), 1.35)
    )
    found.append(("ResNet C/4, C/8, batch 1, eager", geometric(ratios(1, "eager_ms")), 2.0))
    found.append(("ResNet C/4, C/8, batch 1, graphs", geometric(ratios(1, "graph_ms")), 1.4))
    every = [
        best(row["times"], cudnn, "graph_ms") / row["times"]["kegfast"]["graph_ms"]
        for row in tucker
        if "graph_ms" in row["times"]["kegfast"]
    ]
    found.append(("worst configuration over the best cuDNN form", min(every, default=float("nan")), 1.0))
    bandwidth = [
        row["bytes"] / row["times"]["kegfast"]["graph_ms"] * 1e3 / limits["copy_bytes_per_s"]
        for row in tucker
        if row["batch"] == 128 and row["share"] in (4, 8) and "graph_ms" in row["times"]["kegfast"]
    ]
    found.append(("ResNet C/4, C/8, batch 128, share of the measured bandwidth", geometric(bandwidth), 0.7))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds")
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() and build_info()["cuda_kernels"]):
        raise SystemExit("bench_cuda needs a CUDA device and a kegfast built with nvcc")
    begin = time.perf_counter()
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    limits = ceilings()
    grid = [s for s in shapes() if s.family == "resnet" and s.stride == 1]
    jobs: list[tuple[str, Callable[[], dict]]] = [
        (f"diversity {b}", lambda b=b: diversity_row(b)) for b in DIVERSITY_GOALS_MS
    ]
    jobs.append(("generator step", generator_step_row))
    for batch, shape in itertools.product((128, 1), grid):
        jobs.append(
            (
                f"{shape.name} x{batch}",
                lambda s=shape, n=batch: (
                    tucker2_row(s, n, torch.bfloat16)
                    | {"family": s.family, "share": s.channels // s.ranks[0]}
                ),
            )
        )
    for shape in grid[:4]:
        jobs.append(
            (
                f"{shape.name} float32",
                lambda s=shape: (
                    tucker2_row(s, 32, torch.float32)
                    | {"family": s.family, "share": s.channels // s.ranks[0]}
                ),
            )
        )
    rows, left_out = [], []
    for name, job in jobs:
        if time.perf_counter() - begin > arguments.budget:
            left_out.append(name)
            continue
        rows.append(job())
        torch.cuda.empty_cache()
        print(
            f"{time.perf_counter() - begin:6.1f} s  {name}: "
            + ", ".join(f"{k} {min(v.values()) * 1e3:.1f} us" for k, v in rows[-1]["times"].items()),
            flush=True,
        )
    reached = goals(rows, limits)
    device = torch.cuda.get_device_name()
    results = {
        "device": device,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "allow_tf32": torch.backends.cudnn.allow_tf32,
        "ceilings": limits,
        "rows": rows,
        "left_out": left_out,
        "goals": [{"goal": goal, "reached": value, "wanted": wanted} for goal, value, wanted in reached],
    }
    write_results(f"cuda-{device.replace(' ', '-').lower()}", results)
    print(f"allow_tf32: {torch.backends.cudnn.allow_tf32}; left out for time: {left_out or 'nothing'}")
    for goal, value, wanted in reached:
        print(f"{'pass' if value >= wanted else 'falls short':12}{value:8.2f} of {wanted:<6} {goal}")


if __name__ == "__main__":
    main()
