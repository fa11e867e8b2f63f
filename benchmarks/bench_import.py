"""What kegfast costs beside `import torch`: CPU seconds of whole processes, started in turns.

`import kegfast` alone imports neither torch nor its own layers, so `import torch, kegfast` is measured, which
brings both. `python -m benchmarks.bench_import` prints medians and ratio; --limit refuses a larger one.
"""

import argparse
import resource
import statistics
import subprocess
import sys


def cpu_seconds(statement: str) -> float:
    """User and system time of a new interpreter that runs one statement."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", statement], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=10, help="of each")
    parser.add_argument("--limit", type=float, help="the largest ratio that is no error")
    args = parser.parse_args()
    times: dict[str, list[float]] = {"torch": [], "torch, kegfast": []}
    for names in times:
        cpu_seconds(f"import {names}")  # files in the page cache, bytecode written
    for _ in range(args.starts):
        for names, seconds in times.items():
            seconds.append(cpu_seconds(f"import {names}"))
    torch, both = (statistics.median(seconds) for seconds in times.values())
    print(f"import torch {torch:.2f} s, import torch, kegfast {both:.2f} s, ratio {both / torch:.3f}")
    if args.limit is not None and both > args.limit * torch:
        sys.exit(f"import torch, kegfast costs more than {args.limit} times import torch")


if __name__ == "__main__":
    main()
