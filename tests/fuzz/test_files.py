"""Damaged files of every kind that is read: an error of a documented kind each, nothing executed, no hang."""

import json
import os
from pathlib import Path

from fuzz import reading
from fuzz.interpreter import python


def read_damaged(folder: Path, seed: int, count: int) -> list[dict]:
    """What came of `count` damaged files of each kind."""
    done = python("-m", "fuzz.reading", str(folder), str(seed), str(count))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_damaged_files_are_refused_in_words(tmp_path, seeds, share, request):
    budget = bool(os.environ.get("KEGFAST_FUZZ_SECONDS"))
    for seed in seeds(1):
        found = read_damaged(tmp_path / str(seed), seed, 1000 if budget else 12)
        share.cases += sum(result["cases"] for result in found) - 1
        assert {result["kind"] for result in found} == reading.KINDS.keys()
        failures = [f"{result['kind']}: {text}" for result in found for text in result["failures"]]
        assert not failures, "\n".join(failures)
        # Damage that a reader does not notice would show nothing.
        assert all(result["refused"] for result in found if result["kind"] != "metrics"), found


def test_what_would_execute_is_seen(tmp_path):
    """The audit hook sees a call, so that none having been seen means something."""
    script = f"""
import pickle
from pathlib import Path
from fuzz import damage, reading

kind = reading.KINDS["state dict"]
reading.KINDS["state dict"] = kind._replace(
    damage=lambda *_: pickle.dumps(damage.Call()),
    read=lambda path: path.read_bytes()[:2] == b"PK" or pickle.loads(path.read_bytes()),
)
print(*reading.run("state dict", Path({str(tmp_path)!r}), 0, 3)["failures"])
"""
    assert python("-c", script).stdout.count("['os.system']") == 3
