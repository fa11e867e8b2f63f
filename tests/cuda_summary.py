"""A pytest plugin: the last line of a run says how the CUDA kernels were tested."""

KINDS = {
    "emulated on the CPU": "test_cuda_emulated.py",
    "compiled by nvcc": "test_cuda_compile.py",
    "on a device": "test_cuda.py",
}


def pytest_terminal_summary(terminalreporter):
    def count(outcome, file):
        reports = terminalreporter.stats.get(outcome, [])
        return sum(getattr(r, "fspath", "").endswith(f"/{file}") for r in reports if hasattr(r, "fspath"))

    parts = []
    for kind, file in KINDS.items():
        passed, failed, skipped = (count(outcome, file) for outcome in ("passed", "failed", "skipped"))
        if passed or failed or skipped:
            notes = [f"{failed} failed"] * bool(failed) + [f"{skipped} skipped"] * bool(skipped)
            parts.append(f"{passed} {kind}" + (f" ({', '.join(notes)})" if notes else ""))
    if parts:
        terminalreporter.write_line(f"CUDA tests: {', '.join(parts)}")
