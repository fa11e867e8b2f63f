"""Whole networks: dense, as three convolutions per layer, and with kegfast's fused layers.

`python -m benchmarks.bench_models` prints dense / kegfast and sequential / kegfast for LeNet5, ResNet14, and
a ResNet-18 and a ResNet-50 at 224 pixels, every spatial convolution at ranks C/4, and writes
benchmarks/results/models.json; `--training` times forward and backward passes of batch 8 instead
(models_training.json). All rows come twice: as torch allocates by default, and with THP_MEM_ALLOC_ENABLE=1.
`--compiled` adds torch.compile with frozen weights, of the dense and the Sequential network in channels_last
(models_compiled.json); that takes a minute a network to compile, so it is a command of its own.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_tucker2 import take_turns
from benchmarks.common import Traffic, bandwidth, multiply_add_rate, write_results
from benchmarks.resnet import resnet18, resnet50
from kegfast._util.files import write_json
from kegfast.compression import fuse
from kegfast.models import LeNet5, ResNet14
from kegfast.nn import TuckerConv2d

MODELS = {
    "LeNet5": (LeNet5, (1, 32, 32)),
    "ResNet14": (lambda: ResNet14(1, 10), (1, 32, 32)),
    "ResNet-18": (resnet18, (3, 224, 224)),
    "ResNet-50": (resnet50, (3, 224, 224)),
}
GOALS = {"dense": 2.0, "sequential": 1.4}  # ResNet-18


def replace_convolutions(model: nn.Module, share: int, fused: bool) -> nn.Module:
    """A copy with random Tucker-2 layers of ranks C / share for its spatial convolutions from 16 channels."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, conv in list(parent.named_children()):
            spatial = isinstance(conv, nn.Conv2d) and conv.kernel_size != (1, 1)
            if not spatial or min(conv.in_channels, conv.out_channels) < 16:
                continue
            layer = TuckerConv2d(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                (conv.in_channels // share, conv.out_channels // share),
                conv.stride,
                conv.padding,
                bias=conv.bias is not None,
            )
            setattr(parent, name, layer if fused else layer.to_sequential())
    return model


def networks(name: str, layout: torch.memory_format) -> dict[str, nn.Module]:
    """The dense network, as convolutions in a row, and with fused layers, of equal weights."""
    torch.manual_seed(0)
    dense = MODELS[name][0]()
    kinds = {"dense": copy.deepcopy(dense)}
    for kind, fused in (("sequential", False), ("kegfast", True)):
        torch.manual_seed(1)
        kinds[kind] = replace_convolutions(dense, 4, fused)
    return {kind: model.to(memory_format=layout) for kind, model in kinds.items()}


def inference(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A call in evaluation mode."""
    model.eval()

    def call() -> Tensor:
        with torch.no_grad():
            return model(x)

    return call


def training(model: nn.Module, x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward, nothing else; returns the gradients."""
    model.train()
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(model(x).square().mean(), parameters)


def frozen(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """The network as inductor makes it with constant weights, compiled."""
    torch._dynamo.reset()
    call = inference(torch.compile(model.eval(), options={"freezing": True}, dynamic=False), x)
    call()
    return call


def contenders(
    name: str, x: Tensor, layout: torch.memory_format, options: argparse.Namespace
) -> dict[str, Callable[[], object]]:
    """Calls of each kind of network in one layout, verified against each other.

    In inference each kind also comes with its BatchNorms folded, by the same `kegfast.fuse`.
    """
    kinds = networks(name, layout)
    if not options.training:
        kinds |= {f"folded {kind}": fuse(model) for kind, model in kinds.items()}
    with torch.no_grad():
        results = {kind: model.eval()(x) for kind, model in kinds.items()}
    for kind in results.keys() - {"dense", "folded dense"}:
        torch.testing.assert_close(results[kind], results["sequential"], atol=1e-3, rtol=1e-3)
    calls = {kind: (training if options.training else inference)(model, x) for kind, model in kinds.items()}
    if options.compiled and layout is torch.channels_last:  # which inductor turns planes into
        with torch.no_grad():
            calls |= {f"compiled {kind}": frozen(kinds[kind], x) for kind in GOALS}
    return calls


def measure(name: str, batch: int, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each kind of network in its faster layout, and our shares of the machine's limits."""
    calls: dict[str, Callable[[], object]] = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(batch, *MODELS[name][1], generator=torch.Generator().manual_seed(0))
        x = x.contiguous(memory_format=layout)
        steps = contenders(name, x, layout, options)
        calls |= {f"{kind} {layout}": step for kind, step in steps.items()}
    with FlopCounterMode(display=False) as counter:
        steps["kegfast"]()
    with Traffic() as traffic:
        steps["kegfast"]()
    times = take_turns(calls, options.rounds)
    seconds = {kind: min(t for call, t in times.items() if call.startswith(kind)) for kind in steps}
    rate = torch.get_num_threads() * multiply_add_rate()
    return seconds | {
        "share_of_peak": counter.get_total_flops() / 2 / seconds["kegfast"] / rate,
        "share_of_bandwidth": traffic.bytes / seconds["kegfast"] / bandwidth(),
    }


def rows(options: argparse.Namespace) -> list[dict[str, object]]:
    """One record per model, batch and number of threads; printed as they come."""
    records = []
    huge = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name in options.models:
            for batch in options.batches:
                seconds = measure(name, batch, options)
                shares = {limit: seconds.pop(limit) for limit in ("share_of_peak", "share_of_bandwidth")}
                ratios = {kind: seconds[kind] / seconds["kegfast"] for kind in GOALS}
                if not options.training:
                    own = seconds["folded kegfast"]
                    ratios |= {f"folded {kind}": seconds[f"folded {kind}"] / own for kind in GOALS}
                if options.compiled:  # which folds BatchNorms too
                    ratios |= {f"compiled {kind}": seconds[f"compiled {kind}"] / own for kind in GOALS}
                records.append(
                    {
                        "model": name,
                        "threads": threads,
                        "batch": batch,
                        "huge_pages": huge,
                        "seconds": seconds,
                    }
                    | shares
                    | ratios
                )
                verdict = ""
                if name == "ResNet-18" and not options.training:
                    passed = all(ratios[kind] >= goal for kind, goal in GOALS.items())
                    verdict = "pass" if passed else "fall short"
                times = ", ".join(f"{ratio:.2f} x {kind}" for kind, ratio in ratios.items())
                pages = ", torch's memory in huge pages" if huge else ""
                peak, traffic = (f"{share:.0%}" for share in shares.values())
                print(
                    f"{name:10} {threads} threads, batch {batch:2}{pages}: {times}, {peak} of the FMA peak, "
                    f"{traffic} of the bandwidth {verdict}",
                    flush=True,
                )
    return records


def with_huge_pages(arguments: list[str]) -> list[dict[str, object]]:
    """The same rows from a process whose torch allocates in huge pages, which its start decides."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.bench_models", *arguments, "--rows", str(path)]
        subprocess.run(command, env=os.environ | {"THP_MEM_ALLOC_ENABLE": "1"}, check=True)
        return json.loads(path.read_text())


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", help="1 and 8; 8 in training")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--training", action="store_true", help="training steps instead of inference")
    kind.add_argument("--compiled", action="store_true", help="torch.compile with freezing too")
    parser.add_argument("--rows", type=Path, help="write only the rows, here")
    options = parser.parse_args()
    options.batches = options.batches or ([8] if options.training else [1, 8])
    records = rows(options)
    if options.rows:
        write_json(options.rows, records)
        return
    huge = [] if options.compiled else with_huge_pages(sys.argv[1:])
    name = "models_training" if options.training else "models_compiled" if options.compiled else "models"
    write_results(name, {"ranks": "C/4", "configurations": records, "huge_pages": huge})


if __name__ == "__main__":
    main()
