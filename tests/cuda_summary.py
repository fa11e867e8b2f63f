"""A pytest plugin: the last line of a run says how the CUDA kernels were tested."""

from pathlib import Path

KINDS = {
    "emulated on the CPU": ("test_cuda_emulated", "test_cuda_host"),
    "compiled by nvcc": ("test_cuda_compile",),
    "on a device": ("test_cuda.py",),
}


def pytest_terminal_summary(terminalreporter):
    def count(outcome, files):
        reports = terminalreporter.stats.get(outcome, [])
        return sum(Path(getattr(report, "fspath", "")).name.startswith(files) for report in reports)

    parts = []
    for kind, files in KINDS.items():
        passed, failed, skipped = (count(outcome, files) for outcome in ("passed", "failed", "skipped"))
        if passed or failed or skipped:
            notes = [f"{failed} failed"] * bool(failed) + [f"{skipped} skipped"] * bool(skipped)
            parts.append(f"{passed} {kind}" + (f" ({', '.join(notes)})" if notes else ""))
    if parts:
        terminalreporter.write_line(f"CUDA tests: {', '.join(parts)}")
