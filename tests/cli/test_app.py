"""The command line as a whole: info, help, bench, exit codes, config files."""

import json

import torch
from cli_support import run, run_process

import kegfast
from kegfast.cli import main


def test_info(capsys):
    assert run("info --json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(kegfast.build_info()))
    assert run("info") == 0
    assert torch.__version__ in capsys.readouterr().out


def test_help_lists_the_commands(capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    for command in ("info", "train", "extract", "compress", "distill", "evaluate", "demo", "reproduce"):
        assert command in out
        assert run(f"{command} --help") == 0
    assert run("--version") == 0
    assert kegfast.__version__ in capsys.readouterr().out


def test_bench_names_the_benchmarks_that_there_are(capsys):
    assert main(["bench", "nonsense"]) == 2
    assert "soft_target" in capsys.readouterr().err


def test_bench_passes_options_and_the_exit_code_on():
    assert main(["bench", "soft_target", "--help"]) == 0
    assert main(["bench", "soft_target", "--no-such-option"]) == 2


def test_a_process_ends_with_the_same_code():
    done = run_process("evaluate --data none --model lenet5 --weights none.pth")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kegfast evaluate: name must be digits,")
    assert done.stderr.count("\n") == 1


def test_config_lies_under_the_command_line(home):
    (home / "c.toml").write_text(
        'data = "mine.npz"\nmodel = "nets:Net"\nbatch_size = 10\nsteps = 7\n'
        "[train]\nsteps = 9\namp = true\n[evaluate]\nsplit = 'val'\n"
    )
    assert run("train --config c.toml --batch-size 25 --out a") == 0
    options = json.loads((home / "a/options.json").read_text())
    assert (options["batch_size"], options["steps"], options["amp"]) == (25, 9, True)
    assert run("train --config c.toml --no-amp --out b") == 0
    assert json.loads((home / "b/options.json").read_text())["amp"] is False
