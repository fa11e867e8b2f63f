"""Where measured forms are kept, and what a process does that cannot keep any."""

import os
import subprocess
import sys

from kegfast.dispatch.cache import cache_folder


def test_folder_is_the_users_choice_then_the_systems_then_the_homes(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("KEGFAST_CACHE", raising=False)
    assert cache_folder() == tmp_path / "home" / ".cache" / "kegfast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "kegfast"
    monkeypatch.setenv("KEGFAST_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_layer_runs_for_a_user_without_home_or_name():
    """As in a container that runs under a bare number."""
    code = """
import os, pwd
def nobody(number): raise KeyError(number)
pwd.getpwuid = nobody
import kegfast, torch
with torch.no_grad():
    print(kegfast.nn.TuckerConv2d(8, 8, 3, (4, 4))(torch.randn(1, 8, 5, 5)).shape)
"""
    hidden = ("HOME", "XDG_CACHE_HOME", "KEGFAST_CACHE")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[1, 8, 3, 3]" in done.stdout
