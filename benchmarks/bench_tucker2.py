"""The fused Tucker-2 convolution against everything a user could run instead.

`python -m benchmarks.bench_tucker2` prints the goals with pass or "fall short", and writes
benchmarks/results/tucker2*_PROCESSOR_ISA.json, where what a run does not measure again stays; `make
bench-tucker2` does so on one thread and two, for bfloat16 and for training. In float32 ONNX Runtime and
OpenVINO, where they are installed, are among the rivals, on the same factors as three convolutions. Every
result is verified before it is timed; contenders take turns, and all figures are ratios of medians of the
same rounds.
"""

import argparse
import copy
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.common import bandwidth, earlier_results, machine_name, multiply_add_rate, write_results
from benchmarks.rivals import runtimes
from benchmarks.tucker2_shapes import Shape, bf16_shapes, shapes
from kegfast._util import timing
from kegfast.nn import TuckerConv2d

TURN = 3e-4  # seconds


def prepacked(conv: nn.Conv2d, x: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A convolution on oneDNN's own weight layout: what inductor's freezing emits."""
    geometry = conv.padding, conv.stride, conv.dilation, 1
    weight = torch._C._nn.mkldnn_reorder_conv2d_weight(
        conv.weight.detach().to(dtype).to_mkldnn(), *geometry, x.shape
    )
    bias = None if conv.bias is None else conv.bias.detach().to(dtype)
    pointwise = torch.ops.mkldnn._convolution_pointwise
    return lambda x: pointwise(x, weight, bias, *geometry, "none", [], "")


def prepacked_chain(layers: nn.Sequential, x: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The three prepacked convolutions in a row."""
    parts, z = [], x
    for layer in layers:
        parts.append(prepacked(layer, z, dtype))
        z = parts[-1](z)
    first, core, last = parts
    return lambda: last(core(first(x)))


def tltorch_layer(layer: TuckerConv2d, shape: Shape, dtype: torch.dtype) -> nn.Module:
    """tensorly-torch's factorized convolution with these factors; its spatial ones are identities."""
    from tltorch import FactorizedConv

    rank = (*layer.core.weight.shape[:2], shape.kernel, shape.kernel)
    other = FactorizedConv(
        shape.channels, shape.features, shape.kernel, order=2, stride=shape.stride, padding=shape.padding,
        factorization="tucker", implementation="factorized", rank=rank, bias=True,
    )  # fmt: skip
    unit = torch.eye(shape.kernel)
    factors = layer.last.weight.flatten(1), layer.first.weight.flatten(1).T, unit, unit
    with torch.no_grad():
        other.weight.core.copy_(layer.core.weight)
        for own, theirs in zip(other.weight.factors, factors, strict=True):
            own.copy_(theirs)
        other.bias.copy_(layer.last.bias)
    return other.eval().requires_grad_(False).to(dtype)


def contenders(
    shape: Shape, batch: int, dtype: torch.dtype, compiled: bool = False
) -> dict[str, Callable[[], Tensor]]:
    """Everything that computes the layer, by name; ours are called kegfast.

    `compiled` adds torch.compile with frozen weights, which takes seconds for each shape.
    """
    torch.manual_seed(0)
    layer = TuckerConv2d(
        shape.channels, shape.features, shape.kernel, shape.ranks, shape.stride, shape.padding
    )
    layer = layer.eval().requires_grad_(False)
    dense = layer.to_conv().requires_grad_(False).to(dtype)
    layer = layer.to(dtype)
    sequential = layer.to_sequential()
    planes = torch.randn(batch, shape.channels, shape.size, shape.size).to(dtype)
    calls: dict[str, Callable[[], Tensor]] = {}
    for layout, x in (
        ("planes", planes),
        ("channels_last", planes.contiguous(memory_format=torch.channels_last)),
    ):
        own = copy.deepcopy(layer)
        calls[f"kegfast {layout}"] = lambda x=x, own=own: own(x)
        calls[f"sequential {layout}"] = lambda x=x: sequential(x)
        calls[f"dense {layout}"] = lambda x=x: dense(x)
        calls[f"prepacked {layout}"] = prepacked_chain(sequential, x, dtype)
        if importlib.util.find_spec("tltorch"):
            factorized = tltorch_layer(layer.float(), shape, dtype)
            layer.to(dtype)
            calls[f"tltorch {layout}"] = lambda x=x, model=factorized: model(x)
        if compiled:
            torch._dynamo.reset()
            frozen = torch.compile(sequential, options={"freezing": True}, dynamic=False)
            calls[f"compiled {layout}"] = lambda x=x, model=frozen: model(x)
            calls[f"compiled {layout}"]()
    return calls


def exported(shape: Shape, batch: int) -> dict[str, Callable[[], object]]:
    """The runtimes that are installed, verified, on the layer as three convolutions."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "openvino")):
        return {}
    torch.manual_seed(0)
    layer = TuckerConv2d(
        shape.channels, shape.features, shape.kernel, shape.ranks, shape.stride, shape.padding
    )
    x = torch.randn(batch, shape.channels, shape.size, shape.size)
    return runtimes(layer.to_sequential().requires_grad_(False), x)


def training_steps(shape: Shape, batch: int) -> dict[str, Callable[[], None]]:
    """Forward and all gradients."""
    torch.manual_seed(0)
    layer = TuckerConv2d(
        shape.channels, shape.features, shape.kernel, shape.ranks, shape.stride, shape.padding
    )
    sequential = layer.to_sequential()
    planes = torch.randn(batch, shape.channels, shape.size, shape.size)
    calls = {}
    for layout, memory_format in (
        ("planes", torch.contiguous_format),
        ("channels_last", torch.channels_last),
    ):
        x = planes.clone(memory_format=memory_format).requires_grad_()
        gradient = torch.randn_like(layer(x).detach())

        def step(model: nn.Module, x: Tensor = x, gradient: Tensor = gradient) -> None:
            torch.autograd.grad(model(x), [x, *layer.parameters()], gradient)

        calls[f"kegfast {layout}"] = lambda step=step: step(layer)
        calls[f"sequential {layout}"] = lambda step=step: step(sequential)
    return calls


def weight_gradient_share(shape: Shape, batch: int, rounds: int, peak: float) -> float:
    """Of the FMA peak: the weight gradients' multiply-adds in the time that they add to x's gradient."""
    layer = TuckerConv2d(
        shape.channels, shape.features, shape.kernel, shape.ranks, shape.stride, shape.padding
    )
    factors = [f.weight.detach() for f in (layer.first, layer.core, layer.last)]
    x = torch.randn(batch, shape.channels, shape.size, shape.size).contiguous(
        memory_format=torch.channels_last
    )
    geometry = [shape.stride] * 2 + [shape.padding] * 2 + [1] * 2
    ops = torch.ops.kegfast
    y, t1, t2 = ops.tucker2_forward(x, *factors, None, *geometry, False, True)
    gradient = torch.randn_like(y)
    needs = {"x": (True, False, False, False, False), "all": (True, True, True, True, False)}
    times = take_turns(
        {
            name: lambda need=need: ops.tucker2_gradients(
                gradient, None, x, t1, t2, *factors, *geometry, *need
            )
            for name, need in needs.items()
        },
        rounds,
    )
    return shape.multiply_adds(batch) / (times["all"] - times["x"]) / peak


def speedup_by_threads(shape: Shape, batch: int, dtype: torch.dtype, rounds: int) -> float:
    """Our time on one thread over that on all of them, each in its faster layout, in turns."""
    every = torch.get_num_threads()
    x = torch.randn(batch, shape.channels, shape.size, shape.size).to(dtype)
    turns, repeats = {}, {}
    for threads in (1, every):
        for layout in (torch.contiguous_format, torch.channels_last):
            layer = TuckerConv2d(
                shape.channels, shape.features, shape.kernel, shape.ranks, shape.stride, shape.padding
            )
            call = partial(layer.to(dtype).eval(), x.contiguous(memory_format=layout))

            def turn(name: tuple, call: Callable[[], Tensor] = call, threads: int = threads) -> None:
                torch.set_num_threads(threads)
                try:
                    for _ in range(repeats[name]):
                        call()
                finally:
                    torch.set_num_threads(every)

            name = (threads, layout)
            turns[name], repeats[name] = partial(turn, name), 1
            once = timing.interleaved({name: turns[name]}, 2)[name]
            repeats[name] = max(1, round(TURN / once))
    times = {name: t / repeats[name] for name, t in timing.interleaved(turns, rounds).items()}
    fastest = {n: min(t for (threads, _), t in times.items() if threads == n) for n in (1, every)}
    return fastest[1] / fastest[every]


def verify(calls: dict[str, Callable[[], Tensor]], dtype: torch.dtype) -> None:
    """Every contender against the dense layer, before anything is timed."""
    want = calls["dense planes"]().float()
    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    for name, call in calls.items():
        error = (call().float() - want).abs().max() / want.abs().max()
        if not error < tolerance:
            raise AssertionError(f"{name}: relative error {error:.2g}")


def error_over_sequential(shape: Shape) -> float:
    """Our float32 error over that of the Sequential, one image, both against float64; the worse layout."""
    torch.manual_seed(0)
    layer = TuckerConv2d(
        shape.channels, shape.features, shape.kernel, shape.ranks, shape.stride, shape.padding
    ).requires_grad_(False)
    sequential = layer.to_sequential()
    x = torch.randn(1, shape.channels, shape.size, shape.size)
    want = copy.deepcopy(sequential).double()(x.double())
    ratios = []
    for layout in (torch.contiguous_format, torch.channels_last):
        ours, theirs = (model(x.contiguous(memory_format=layout)) for model in (layer, sequential))
        ratios.append((ours - want).norm() / (theirs - want).norm())
    return max(ratios).item()


def take_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds per call; short calls repeat inside a turn.

    By the wall clock: a runtime may compute on a thread of its own, which no CPU clock of the caller sees.
    """
    return timing.interleaved(calls, rounds, turn=TURN)


def best(times: dict[str, float], prefix: str = "") -> float:
    """The fastest contender that is not ours, or the fastest of one kind."""
    return min(t for n, t in times.items() if n.startswith(prefix) and (prefix or "kegfast" not in n))


def geometric_mean(values: list[float]) -> float:
    """exp of the mean logarithm; NaN of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def measure(
    grid: list[Shape], batch: int, rounds: int, dtype: torch.dtype, training: bool, compiled: bool = False
) -> Iterator[dict[str, object]]:
    """One record per configuration. Shares are of the cores' FMA rate for dtype and of a copy's bandwidth."""
    threads = torch.get_num_threads()
    peak, memory = threads * multiply_add_rate(dtype), bandwidth()
    for shape in grid:
        extra: dict[str, float] = {}
        if training:
            times = take_turns(training_steps(shape, batch), rounds)
            extra["weight_gradient_share"] = weight_gradient_share(shape, batch, rounds, peak)
        else:
            with torch.inference_mode(False), torch.no_grad():
                extra["float32_error_over_sequential"] = error_over_sequential(shape)
                calls = contenders(shape, batch, dtype, compiled)
                verify(calls, dtype)
                rivals = exported(shape, batch) if dtype == torch.float32 else {}
                times = take_turns(calls | rivals, rounds)
                if threads > 1:
                    extra["speedup_by_threads"] = speedup_by_threads(shape, batch, dtype, rounds)
        ours = best(times, "kegfast")
        yield (
            asdict(shape)
            | extra
            | {
                "name": shape.name,
                "batch": batch,
                "seconds": times,
                "best_rival": best(times) / ours,
                "gflops": 2e-9 * shape.multiply_adds(batch) / ours,
                "share_of_peak": shape.multiply_adds(batch) / ours / peak,
                "rival_share_of_peak": shape.multiply_adds(batch) / best(times) / peak,
                "share_of_bandwidth": shape.bytes_moved(batch, dtype) / ours / memory,
            }
        )


SHARES = "share of the FMA peak", "the rivals' share", "share of the bandwidth"
GOALS = {  # by batch 1, 8, 64
    "best rival": (3.0, 2.1, 1.7),
    "best rival, ResNet shapes": (1.9, 1.45, 1.45),
    "best rival, worst configuration": (1.25, 1.0, 1.0),
    "NCHW Sequential": (3.5, 2.6, 3.0),
    "dense layer": (9.0, 6.5, 5.5),
}
WEIGHT_SHARE = "weight gradients, share of peak"
SPEEDUP, SPEEDUP_SHARE = "two threads over one", "two threads over one, share of at least 1.8"
THREADS_GOALS = {SPEEDUP: (math.nan, 1.8, 1.8), SPEEDUP_SHARE: (math.nan, 1.0, 1.0)}
TRAINING_GOALS = {"best rival": (math.nan, 1.4, 1.4), WEIGHT_SHARE: (math.nan, 0.7, 0.7)}
BF16_GOALS = {"best rival": (5.0, 2.0, 1.6)}


def summary(records: list[dict]) -> dict[str, float]:
    """The rows of the table for one batch size."""
    ratios = [r["best_rival"] for r in records]
    resnet = [r["best_rival"] for r in records if r["family"] == "resnet"]

    def against(prefix: str, own: str = "kegfast") -> float:
        pairs = ((best(r["seconds"], prefix), best(r["seconds"], own)) for r in records)
        return geometric_mean([theirs / mine for theirs, mine in pairs])

    rows = {
        "best rival": geometric_mean(ratios),
        "best rival, ResNet shapes": geometric_mean(resnet),
        "best rival, worst configuration": min(ratios),
        "NCHW Sequential": against("sequential planes"),
        "NCHW Sequential, ours NCHW too": against("sequential planes", "kegfast planes"),
        "channels_last Sequential, ours too": against("sequential channels_last", "kegfast channels_last"),
        "geometric mean, GFLOP/s": geometric_mean([r["gflops"] for r in records]),
        "share of the FMA peak": geometric_mean([r["share_of_peak"] for r in records]),
        "the rivals' share": geometric_mean([r["rival_share_of_peak"] for r in records]),
        "share of the bandwidth": geometric_mean([r["share_of_bandwidth"] for r in records]),
    }
    if "speedup_by_threads" in records[0]:
        speedups = [r["speedup_by_threads"] for r in records]
        rows[SPEEDUP] = geometric_mean(speedups)
        rows[SPEEDUP_SHARE] = sum(speedup >= 1.8 for speedup in speedups) / len(speedups)
    if "weight_gradient_share" in records[0]:
        rows[WEIGHT_SHARE] = geometric_mean([r["weight_gradient_share"] for r in records])
    if "dense planes" in records[0]["seconds"]:
        rows["dense layer"] = against("dense")
    return rows


def print_table(tables: dict[int, dict[str, float]], goals: dict[str, tuple[float, ...]]) -> None:
    """Rival / kegfast per line and batch, with the goal and the verdict."""
    batches = (1, 8, 64)
    print(f"{'rival / kegfast':44}" + "".join(f"{f'batch {b}':>26}" for b in batches))
    for row, goal in goals.items():
        cells = []
        for b, need in zip(batches, goal, strict=True):
            got = tables.get(b, {}).get(row)
            if got is None or math.isnan(need) or math.isnan(got):
                cells.append("-")
            else:
                verdict = "pass" if got >= need else "fall short"
                cells.append(f"{got:.2f} (>= {need:.2f} {verdict})")
        print(f"{row:44}" + "".join(f"{cell:>26}" for cell in cells))


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--family", choices=["lenet", "cifar", "resnet"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--compiled", action="store_true", help="torch.compile with freezing too (slow)")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    grid = shapes() if dtype == torch.float32 else bf16_shapes()
    grid = [s for s in grid if options.family in (None, s.family)]
    found = []
    for batch in options.batches:
        for record in measure(grid, batch, options.rounds, dtype, options.training, options.compiled):
            found.append(record)
            if options.verbose:
                micro = {n: round(1e6 * t, 1) for n, t in record["seconds"].items()}
                ratio, rate = record["best_rival"], record["gflops"]
                print(f"{batch:3} {record['name']:28} {ratio:5.2f} {rate:6.1f} {micro}", flush=True)
    kind = "training" if options.training else options.dtype
    kind += "_compiled" if options.compiled else ""
    name = f"tucker2_{kind}_{options.threads}threads_{machine_name()}"
    known = {(r["batch"], r["name"]): r for r in earlier_results(name).get("configurations", [])}
    known |= {(r["batch"], r["name"]): r for r in found}
    records = [known[key] for key in sorted(known, key=lambda key: key[0])]
    by_batch = {batch: [r for r in records if r["batch"] == batch] for batch, _ in known}
    whole = shapes() if dtype == torch.float32 else bf16_shapes()
    tables = {b: summary(by_batch[b]) for b in sorted(by_batch) if len(by_batch[b]) == len(whole)}
    goals = TRAINING_GOALS if options.training else BF16_GOALS if dtype == torch.bfloat16 else GOALS
    print_table(tables, goals | (THREADS_GOALS if options.threads > 1 and not options.training else {}))
    for batch, table in tables.items():
        shares = ", ".join(f"{table[name]:.0%} {name}" for name in SHARES)
        print(f"batch {batch}: {shares}")
    write_results(
        name,
        {
            "threads": options.threads,
            "summary": {str(batch): table for batch, table in tables.items()},
            "configurations": records,
        },
    )


if __name__ == "__main__":
    main()
