"""Whole networks: dense, as three convolutions per layer, and with kegfast's fused layers.

`python -m benchmarks.bench_models` prints dense / kegfast and sequential / kegfast for LeNet5, ResNet14, and
a ResNet-18 and a ResNet-50 at 224 pixels, every spatial convolution at ranks C/4, and writes
benchmarks/results/models.json.
"""

import argparse
import copy

import torch
from torch import Tensor, nn

from benchmarks.bench_tucker2 import take_turns
from benchmarks.common import write_results
from benchmarks.resnet import resnet18, resnet50
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


def measure(name: str, batch: int, rounds: int) -> dict[str, float]:
    """Median seconds of each kind of model in its faster memory layout."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    dense = make().eval()
    x = torch.randn(batch, *shape)
    calls = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        kinds = {"dense": copy.deepcopy(dense)}
        for kind, fused in (("sequential", False), ("kegfast", True)):
            torch.manual_seed(1)
            kinds[kind] = replace_convolutions(dense, 4, fused).eval()
        own = x.contiguous(memory_format=layout)
        outputs: dict[str, Tensor] = {}
        for kind, model in kinds.items():
            model.to(memory_format=layout)
            outputs[kind] = model(own)
            calls[f"{kind} {layout}"] = lambda model=model, own=own: model(own)
        torch.testing.assert_close(outputs["kegfast"], outputs["sequential"], atol=1e-3, rtol=1e-3)
    times = take_turns(calls, rounds)
    kinds = ("dense", "sequential", "kegfast")
    return {kind: min(t for call, t in times.items() if call.startswith(kind)) for kind in kinds}


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    records = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name in options.models:
            for batch in options.batches:
                with torch.no_grad():
                    seconds = measure(name, batch, options.rounds)
                ratios = {kind: seconds[kind] / seconds["kegfast"] for kind in GOALS}
                records.append(
                    {"model": name, "threads": threads, "batch": batch, "seconds": seconds} | ratios
                )
                verdict = ""
                if name == "ResNet-18":
                    passed = all(ratios[kind] >= goal for kind, goal in GOALS.items())
                    verdict = "pass" if passed else "fall short"
                times = ", ".join(f"{ratios[kind]:.2f} x {kind}" for kind in GOALS)
                print(f"{name:10} {threads} threads, batch {batch:2}: {times} {verdict}", flush=True)
    write_results("models", {"ranks": "C/4", "configurations": records})


if __name__ == "__main__":
    main()
