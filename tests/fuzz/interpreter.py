"""Another interpreter, for what must not happen in this one."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` with this one's paths; a fork in it inherits no pool of threads."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
