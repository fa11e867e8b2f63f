"""What torch frees stays with the process."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from kegfast.cli.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        [torch.zeros(24 << 18) for _ in range(4)]  # 24 MB each, given back at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed_memory()
faults()
print(first, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_memory_is_asked_for_once():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 300  # 768 MB, even where the kernel gives pages of 2 MB
    assert after < before / 10
