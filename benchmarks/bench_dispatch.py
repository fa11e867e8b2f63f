"""Which form of a Tucker-2 layer is the fastest on this class of machines: kegfast/dispatch/cpu_table.json.

`python -m benchmarks.bench_dispatch` measures the layers of `bench_tucker2` and of the whole networks of
`bench_models`, in both memory formats and each number of threads, and keeps the shapes where another form
than the kernels' own choice is faster by more than `MARGIN`, twice in a row. For shapes of one's own there is
`kegfast.autotune`.
"""

import argparse
import statistics
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.bench_models import MODELS, networks
from benchmarks.tucker2_shapes import shapes
from kegfast._tuning import layer_calls
from kegfast.dispatch import cpu
from kegfast.dispatch.forms import Form
from kegfast.nn import TuckerConv2d

MARGIN = 0.02
LAYOUTS = torch.contiguous_format, torch.channels_last


def layers(batches: list[int]) -> Iterator[tuple[TuckerConv2d, Tensor]]:
    """Layers with inputs, planes and channels_last."""
    for batch in batches:
        for s in shapes():
            layer = TuckerConv2d(s.channels, s.features, s.kernel, s.ranks, s.stride, s.padding).eval()
            x = torch.randn(batch, s.channels, s.size, s.size)
            for layout in LAYOUTS:
                yield layer, x.contiguous(memory_format=layout)
    for name, (_, size) in MODELS.items():
        for layout in LAYOUTS:
            model = networks(name, layout)["kegfast"]
            for batch in (1, 8):
                x = torch.randn(batch, *size).contiguous(memory_format=layout)
                yield from ((call.layer, call.x) for call in layer_calls(model, x))


def faster_form(layer: TuckerConv2d, x: Tensor, shape: cpu.Shape) -> tuple[Form, float] | None:
    """The form that beats the kernels' own choice, and how often it fits into that one's time."""
    cpu.prefer(shape, None)
    with torch.no_grad():
        layer(x)
    own = cpu.runs()
    gains, found = [], None
    for _ in range(2):
        times = cpu.measure(layer, x, shape)
        best = min(times, key=times.__getitem__)
        gains.append(times[own] / times[best])
        if gains[-1] < 1 + MARGIN or found not in (None, best):
            return None
        found = best
    return found, statistics.mean(gains)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    found: dict[cpu.Shape, Form] = {}
    seen: set[cpu.Shape] = set()
    for threads in options.threads:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        for layer, x in layers(options.batches):
            geometry = layer.core.stride, layer.core.padding, layer.core.dilation
            shape = cpu.shape_of(x, layer.core.weight, layer.last.out_channels, geometry)
            if shape in seen:
                continue
            seen.add(shape)
            faster = faster_form(layer, x, shape)
            cpu.prefer(shape, None)
            if faster:
                found[shape], gain = faster
                print(f"{cpu.name_of(shape)}: {found[shape]}, {gain:.2f} x", flush=True)
    print(f"another form in {len(found)} of {len(seen)} shapes on {cpu.machine_class()}")
    cpu.write_packaged(found)


if __name__ == "__main__":
    main()
