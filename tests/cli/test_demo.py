"""demo from the command line."""

import json
from functools import partial

from cli_support import run

from kegfast.compression import matching
from kegfast.experiments import demo


def test_demo_leaves_a_table_and_a_report(home, capsys, monkeypatch):
    small = {"teacher_batch": 8, "generator_batch": 4, "student_batch": 8, "ranks": (0.4, 0.1)}
    small |= {"pool": 32, "latency_batch": 2, "latency_rounds": 3, "share": 0.01}
    monkeypatch.setattr(matching, "STEPS", 2)
    monkeypatch.setattr(demo, "DemoConfig", partial(demo.DemoConfig, **small))
    command = "demo --teacher-steps 2 --generators 2 --generator-steps 3 --student-steps 2 --seed 7 --no-amp"
    assert run(command) == 0
    out = capsys.readouterr().out
    assert "KegNet" in out
    assert "report in runs/demo/report.html" in out.replace("\n", " ")
    folder = home / "runs/demo"
    config = json.loads((folder / "config.json").read_text())
    assert (config["seed"], config["amp"], config["teacher_steps"], config["generators"]) == (7, False, 2, 2)
    assert (config["generator_steps"], config["student_steps"], config["pool"]) == (3, 2, 32)
    results = json.loads((folder / "results.json").read_text())
    assert len(results["students"]) == 2
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert "data:image/png" in page
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"train": 2, "extract": 3}.items() <= {e["stage"]: e["step"] for e in entries}.items()
    cells = (folder / "cells.json").stat().st_mtime_ns
    assert run(f"{command} --resume") == 0
    assert (folder / "cells.json").stat().st_mtime_ns == cells  # nothing ran again
    assert json.loads((folder / "results.json").read_text())["students"] == results["students"]
