"""The demo over several seeds:  python -m benchmarks.bench_demo [--seeds 0 1 2] [--out runs/bench_demo]

Each seed keeps its run folder and goes on from it, so a stopped benchmark is continued by the same command.
"""

import argparse
from pathlib import Path

from benchmarks.common import write_results
from kegfast.experiments.demo import DemoConfig, run_demo


def main() -> None:
    """Runs, writes benchmarks/results/demo.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench_demo"))
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        out = args.out / f"seed{seed}"
        runs.append(run_demo(DemoConfig(seed=seed), out, resume=True, progress=True))
    write_results("demo", {"runs": runs})


if __name__ == "__main__":
    main()
