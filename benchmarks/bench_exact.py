"""What it costs a repeated call to compare every byte of its factors: benchmarks/results/tucker2_exact.json.

`python -m benchmarks.bench_exact` times each layer of `tucker2_shapes` as it is, and with its factors
promised to be final (`TuckerConv2d.final_`), the same call without the comparison; the two take turns.
"""

import argparse
import json

import torch

from benchmarks.common import update_tables, write_results
from benchmarks.tables import captioned, exact_comparison
from benchmarks.tucker2_shapes import Shape, shapes
from kegfast._util.timing import interleaved
from kegfast.nn import TuckerConv2d


def layers(shape: Shape) -> dict[str, TuckerConv2d]:
    """Twins with the same numbers, each in memory of its own."""
    exact, final = (
        TuckerConv2d(
            shape.channels, shape.features, shape.kernel, shape.ranks, shape.stride, shape.padding
        ).eval()
        for _ in range(2)
    )
    final.load_state_dict(exact.state_dict())
    return {"exact": exact, "final": final.final_()}


@torch.inference_mode(False)
@torch.no_grad()
def measure(shape: Shape, batch: int, rounds: int) -> dict[str, object]:
    """Microseconds of both, each after a call of its own."""
    x, twins = torch.randn(batch, shape.channels, shape.size, shape.size), layers(shape)
    for layer in twins.values():
        for _ in range(3):
            layer(x)
        assert layer._memory.settled.call is not None, "the call is not repeated"
    calls = {name: lambda layer=layer: layer(x) for name, layer in twins.items()}
    times = interleaved(calls, rounds, turn=2e-3, warm=True, clock="cpu")
    factors = [twins["exact"].first, twins["exact"].core, twins["exact"].last]
    return {
        "layer": shape.name,
        "family": shape.family,
        "batch": batch,
        "bytes": sum(part.weight.nbytes for part in factors),
        **{name: 1e6 * seconds for name, seconds in times.items()},
    }


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    records = []
    for shape in shapes():
        for batch in options.batches:
            records.append(measure(shape, batch, options.rounds))
            print(records[-1], flush=True)
    results = {"threads": 1, "configurations": records}
    written = json.loads(write_results("tucker2_exact", results).read_text(encoding="utf-8"))
    update_tables("exact comparison", captioned(exact_comparison, written, written))


if __name__ == "__main__":
    main()
