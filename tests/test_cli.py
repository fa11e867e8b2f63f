"""The command line: what it writes, what it says, and its exit codes."""

import json
import os
import shlex
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import kegfast
from kegfast.cli import main
from kegfast.cli.compress import parse_ranks
from kegfast.experiments import demo
from kegfast.files import read_state_dict, read_tensors, save_tensors

MODELS = """
import os, signal
import torch
from torch import nn

class Net(nn.Module):
    '''Sends Ctrl-C to its own process at call CTRL_C_AT.'''
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.calls = 0
    def forward(self, x):
        self.calls += self.training
        if self.calls == int(os.environ.get("CTRL_C_AT", -1)):
            os.kill(os.getpid(), signal.SIGINT)
        return self.net(x)

class Pair(Net):
    def forward(self, x):
        return super().forward(x), x

def double():
    return Net().double()

def broken():
    raise RuntimeError("broken inside")

def number():
    return 3
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty current folder with a user's model and data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(MODELS)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    samples = rng.normal(size=(200, 6)) + 3 * np.eye(6)[labels]
    np.savez("mine.npz", samples=samples, labels=labels)
    yield tmp_path
    sys.modules.pop("nets", None)


@pytest.fixture(autouse=True)
def interrupts():
    """Ctrl-C as on a terminal; a background job's tests would start with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(command: str) -> int:
    return main(shlex.split(command))


def run_process(command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "kegfast", *shlex.split(command)], capture_output=True, text=True, **options
    )


def last_line(capsys) -> str:
    """The one line on stderr."""
    err = capsys.readouterr().err
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return err.strip()


TRAIN = "train --data mine.npz --model nets:Net --steps 30 --batch-size 20 --out a"


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
    with pytest.raises(SystemExit) as stop:
        main(["bench", "soft_target", "--no-such-option"])
    assert stop.value.code == 2


def test_a_process_ends_with_the_same_code():
    done = run_process("evaluate --data none --model lenet5 --weights none.pth")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kegfast evaluate: name must be digits,")
    assert done.stderr.count("\n") == 1


def test_train_then_evaluate(home, capsys):
    assert run(f"{TRAIN} --epochs 20".replace("--steps 30", "")) == 0
    results = json.loads((home / "a/results.json").read_text())
    assert results["accuracy"]["test"] > 80
    assert results["steps"] == 20 * (140 // 20)
    steps = [json.loads(line)["step"] for line in (home / "a/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(10, 141, 10))
    capsys.readouterr()
    assert run("evaluate --data mine.npz --model nets:Net --weights a/model.safetensors") == 0
    accuracy = float(capsys.readouterr().out.split(" %")[0])
    assert accuracy == pytest.approx(results["accuracy"]["test"], abs=0.005)


def test_published_teacher_from_the_command_line(shared, capsys):
    weights = shared / "pretrained/kegnet/mnist.pth.tar"
    assert run(f"evaluate --data mnist --root {shared}/data --model lenet5 --weights {weights}") == 0
    assert capsys.readouterr().out == "98.91 % of 10000 samples (mnist, test)\n"


def test_extract_writes_generators_that_load(home, capsys):
    assert run(TRAIN) == 0
    options = "--model nets:Net --weights a/model.safetensors --steps 12 --batch-size 16 --generators 2"
    assert run(f"extract --data mine.npz {options} --out g") == 0
    generators = kegfast.Generators.load(home / "g/generators.safetensors")
    assert len(generators) == 2
    assert generators.sample(5)[0].shape == (5, 6)
    # The same from the shape alone, without data.
    assert run(f"extract --sample-shape 6 --num-classes 3 {options} --out h") == 0
    g, h = (read_tensors(home / name / "generators.safetensors") for name in "gh")
    assert g[1] == h[1]
    assert all(torch.equal(g[0][name], h[0][name]) for name in g[0])


STUDENT = "--model nets:Net --weights a/model.safetensors --student s/student.safetensors"


def test_compress_then_distill_then_evaluate(home, capsys):
    assert run(TRAIN) == 0
    compress = "compress --model nets:Net --weights a/model.safetensors --data mine.npz --evaluate"
    assert run(f"{compress} --rank net.0=2,3 -o s/student.safetensors") == 0
    report = json.loads((home / "s/student.json").read_text())
    ranks = {layer["name"]: layer["rank"] for layer in report["layers"]}
    assert ranks == {"net.0": [2, 3], "net.3": None}
    assert report["parameters"] < report["parameters_before"]
    assert (
        run(f"extract --data mine.npz {STUDENT.split(' --student')[0]} --steps 5 --generators 2 --out g") == 0
    )
    distill = f"distill --data mine.npz {STUDENT} --steps 20 --evaluate"
    for source in ("real", "gaussian uniform", "g/generators.safetensors", "real --pool 64"):
        assert run(f"{distill} --source {source} --out d") == 0
        results = json.loads((home / "d/results.json").read_text())
        assert results["before"] == report["accuracy"][1]
    losses = "soft_target+rkd_distance:25+rkd_angle:50+boundary"
    assert run(f"{distill} --source real --loss {losses} --out d") == 0
    results = json.loads((home / "d/results.json").read_text())
    assert {"soft_target", "rkd_distance", "rkd_angle"} < results.keys()
    student = read_tensors(home / "d/student.safetensors")[0]
    assert any(
        not torch.equal(student[name], t)
        for name, t in read_tensors(home / "s/student.safetensors")[0].items()
    )
    capsys.readouterr()
    # The file tells its structure: no --model.
    assert run("evaluate --data mine.npz --weights d/student.safetensors") == 0
    assert float(capsys.readouterr().out.split(" %")[0]) == pytest.approx(results["after"], abs=0.005)


def test_distill_resumes_to_the_same_result(home, monkeypatch, capsys):
    assert run(TRAIN) == 0
    assert (
        run("compress --model nets:Net --weights a/model.safetensors --rank 0.5 -o s/student.safetensors")
        == 0
    )
    distill = f"distill --data mine.npz {STUDENT} --steps 20 --source gaussian --batch-size 8"
    assert run(f"{distill} --out whole") == 0
    monkeypatch.setenv("CTRL_C_AT", "9")
    capsys.readouterr()
    assert run(f"{distill} --out d") == 130
    assert "stopped at step 9 of 20; go on with: kegfast distill" in last_line(capsys)
    monkeypatch.delenv("CTRL_C_AT")
    assert run("distill --out d --resume") == 0
    whole, resumed = (read_tensors(home / name / "student.safetensors")[0] for name in ("whole", "d"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("rules", "rank"),
    [
        (["evbmf"], "evbmf"),
        (["energy=0.9"], "energy=0.9"),
        (["0.5"], 0.5),
        (["8,11"], (8, 11)),
        (["-,4"], (None, 4)),
        (["a.*=8,11", "b=0.5", "c=energy=0.9"], {"a.*": (8, 11), "b": 0.5, "c": "energy=0.9"}),
    ],
)
def test_rank_rules(rules, rank):
    assert parse_ranks(rules) == rank


def test_ctrl_c_says_how_to_go_on_to_the_same_result(home, monkeypatch, capsys):
    assert run(TRAIN.replace("--out a", "--out whole")) == 0
    monkeypatch.setenv("CTRL_C_AT", "17")
    capsys.readouterr()
    assert run(TRAIN) == 130
    line = last_line(capsys)
    assert line == f"kegfast train: train stopped at step 17 of 30; go on with: kegfast {TRAIN} --resume"
    assert not (home / "a/model.safetensors").exists()
    monkeypatch.delenv("CTRL_C_AT")
    assert run("train --out a --resume") == 0  # its options are in the folder
    whole, resumed = (read_state_dict(home / name / "model.safetensors") for name in ("whole", "a"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (home / "a/results.json").read_text() == (home / "whole/results.json").read_text()


def test_a_process_that_ctrl_c_stops_ends_with_130(home):
    done = run_process(
        TRAIN, env=os.environ | {"CTRL_C_AT": "5"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert done.returncode == 130
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("--resume\n")


def test_resume_refuses_other_options(home, capsys):
    assert run(TRAIN) == 0
    capsys.readouterr()
    assert run("train --out a --resume --lr 0.5") == 2
    assert last_line(capsys) == "kegfast train: --lr was None in the run to resume, got 0.5"


def test_an_error_before_the_first_step_leaves_an_older_run_alone(home):
    assert run(TRAIN) == 0
    before = {path.name: path.read_bytes() for path in (home / "a").iterdir()}
    assert run(f"{TRAIN} --batch-size -1") == 2
    assert {path.name: path.read_bytes() for path in (home / "a").iterdir()} == before


def test_a_run_without_a_seed_of_its_own_repeats_itself(home):
    for out in ("x", "y"):
        assert run(TRAIN.replace("--out a", f"--out {out}")) == 0
    assert run(TRAIN.replace("--out a", "--out z --seed 1")) == 0
    x, y, z = (read_state_dict(home / out / "model.safetensors")["net.0.weight"] for out in "xyz")
    assert torch.equal(x, y)
    assert not torch.equal(x, z)


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps =", "expected TOML"),
        ("no_such_option = 3", "unrecognized arguments: --no-such-option=3"),
        ("steps = 'many'", "invalid int value: 'many'"),
        ("optimizer = 'lbfgs'", "invalid choice: 'lbfgs'"),
        ("lr = 1979-05-27", "lr must be a string, number"),
    ],
)
def test_a_wrong_config_is_one_line(home, capsys, text, message):
    (home / "c.toml").write_text(text)
    assert run("train --config c.toml --data mine.npz --model nets:Net") == 2
    assert message in last_line(capsys)


def wrong_weights(home, name: str) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    state = {f"net.{key}": value for key, value in net.state_dict().items()}
    if name == "nan.safetensors":
        state["net.0.weight"][2, 3] = float("nan")
    if name == "shape.safetensors":
        state["net.0.weight"] = torch.ones(8, 7)
    if name == "foreign.safetensors":
        state = {"embedding": torch.ones(2)}
    save_tensors(home / name, state)


SHORT = {
    "TEACHER": "NET --weights good.safetensors",
    "MINE": "--data mine.npz NET",
    "NET": "--model nets:Net",
}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "the following arguments are required: command"),
        ("fly", "invalid choice: 'fly'"),
        ("train MINE --steps x", "invalid int value"),
        ("train MINE --steps 0", "steps must be a positive int, got 0"),
        ("train MINE --lr -1", "lr must be a positive number"),
        ("train MINE --lr nan", "argument --lr: invalid number value: 'nan'"),
        ("train MINE --epochs -1", "epochs must be a positive number"),
        ("train MINE --weight-decay -1", "weight_decay must be a number of at least 0"),
        ("train MINE --label-smoothing 7", "label_smoothing must be a share"),
        ("train MINE --device meta", "device must be one"),
        ("train --data mine.npz --model nets:Pair", "got a tuple of a float32 tensor of shape (2, 3) on"),
        ("train --data mine.npz --model nets:double", "model must take samples of shape (6,)"),
        ("train --data cifar --model lenet5", "name must be digits, mnist,"),
        ("train --data svhn --model resnet14 --root .", "svhn/train_32x32.mat is missing; put"),
        ("train --data none.npz --model mlp", "none.npz: No such file or directory"),
        ("train --data one_class.npz --model mlp", "num_classes must be 2 or more, got 1"),
        ("train --data no_class.npz --model mlp", "samples must be"),
        ("train --data mine.npz --model vgg", "model must be lenet5, resnet14, mlp or package.module"),
        ("train --data mine.npz", "model must be given"),
        ("train --data mine.npz --model nets:Missing", "has no attribute 'Missing'"),
        ("train --data mine.npz --model no_module:Net", "No module named 'no_module'"),
        ("train --data mine.npz --model nets:broken", "broken inside"),
        ("train --data mine.npz --model nets:number", "must give a torch.nn.Module, got int"),
        ("train --data digits NET", "model must take samples of shape (1, 32, 32)"),
        ("train --data digits --model mlp", "model mlp takes rows of a table"),
        ("train --data four.npz NET", "model must give 4 logits"),
        ("train MINE --device tpu9", "device must be one"),
        ("train MINE --out mine.npz/sub", "mine.npz/sub: Not a directory"),
        ("train MINE --lr 1e30 --optimizer sgd", "lower learning rate"),
        ("evaluate MINE --weights none.pth", "none.pth: No such file"),
        ("evaluate MINE --weights mine.npz", "damaged, foreign"),
        ("evaluate MINE --weights text.safetensors", "expected a safetensors"),
        ("evaluate MINE --weights nan.safetensors", "not finite: net.0.weight"),
        ("evaluate MINE --weights shape.safetensors", "shape: net.0.weight"),
        ("evaluate MINE --weights foreign.safetensors", "unexpected: embedding"),
        ("extract TEACHER", "data must be given"),
        ("extract TEACHER --sample-shape 6 --num-classes 1",
         "num-classes must be 2 or more"),
        ("extract TEACHER --sample-shape 5 --num-classes 3",
         "model must take samples of shape (5,)"),
        ("extract TEACHER --data mine.npz --recipe none",
         "recipe must be one of"),
        ("extract TEACHER --sample-shape 3 8 8 --num-classes 3 --mean 1 1 1 --std 1 1 0",
         "std must be above 0"),
        ("extract TEACHER --sample-shape 3 8 8 --num-classes 3 --mean 1",
         "mean and std must have 3 values"),
        ("compress TEACHER --rank best", "rank must be"),
        ("compress TEACHER --rank net.9=2,2", "rank must match a layer"),
        ("compress TEACHER --rank a=2 0.5", "PATTERN=RULE for each pattern, got '0.5'"),
        ("compress TEACHER --budget 0.4", "budget must be KIND=SHARE"),
        ("compress TEACHER --budget size=0.4", "budget must be one of"),
        ("compress TEACHER --example 1,x", "example must be a shape"),
        ("compress TEACHER --example 2,5", "example_input must be what the model takes"),
        ("compress TEACHER --samples -1", "samples must be an int of at least 2"),
        ("compress TEACHER -o .", "must be a file, new or to be replaced"),
        ("compress TEACHER --calibrate uniform", "calibrate needs --data"),
        ("compress TEACHER --evaluate", "evaluate needs --data"),
        ("compress NET --weights nan.safetensors", "not finite: net.0.weight"),
        ("compress TEACHER -o mine.npz/s.safetensors", "mine.npz: File exists"),
        ("distill TEACHER --student none.safetensors --data mine.npz --source real",
         "none.safetensors: No such file"),
        ("distill TEACHER --student good.safetensors --data mine.npz --source g",
         "source must be uniform, gaussian, leaves, real or a file of generators, got 'g'"),
        ("distill TEACHER --student good.safetensors --data mine.npz "
         "--source leaves", "source leaves needs images"),
        ("distill TEACHER --student good.safetensors --data mine.npz "
         "--source text.safetensors", "expected a safetensors"),
        ("distill TEACHER --student good.safetensors --data mine.npz "
         "--source real --loss none", "loss must"),
        ("distill TEACHER --student good.safetensors --data mine.npz "
         "--source real --loss soft_target:-1", "a number of at least 0"),
        ("distill TEACHER --student good.safetensors --data mine.npz "
         "--source real --temperature 0", "temperature must be a number above 0"),
        ("demo --generators 0", "generators must be a positive int"),
        ("demo --student-steps 0", "student_steps must be a positive int"),
        ("demo --data mine.npz", "dataset must be one of images"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(home, capsys, command, message):
    np.savez("one_class.npz", samples=np.ones((9, 6)), labels=np.zeros(9, int))
    np.savez("no_class.npz", samples=np.ones((0, 6)), labels=np.zeros(0, int))
    np.savez("four.npz", samples=np.ones((9, 6)), labels=np.arange(9) % 4)
    (home / "text.safetensors").write_text("this is text and no safetensors file")
    for name in ("good", "nan", "shape", "foreign"):
        wrong_weights(home, f"{name}.safetensors")
    for short, full in SHORT.items():
        command = command.replace(short, full)
    assert run(command) == 2
    line = last_line(capsys)
    assert line.startswith("kegfast")
    assert message in line
    left = {path.name for path in home.glob("runs/**/*") if path.is_file()}
    assert left == set()


def test_demo_leaves_a_table_and_a_report(home, capsys, monkeypatch):
    small = {"teacher_batch": 8, "generator_batch": 4, "student_batch": 8, "ranks": (0.4, 0.1)}
    small |= {"pool": 32, "latency_batch": 2, "latency_rounds": 3}
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


def test_a_full_disk_is_one_line_and_leaves_the_old_files(home):
    assert run(TRAIN) == 0
    before = {path.name: path.read_bytes() for path in (home / "a").iterdir()}
    # A limit on the size of files fails as a full disk does: in the middle of writing.
    script = f"""
import resource, sys
from kegfast.cli import main
from kegfast.cli.compress import parse_ranks
resource.setrlimit(resource.RLIMIT_FSIZE, (800, 800))
sys.exit(main({shlex.split(TRAIN)!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"kegfast train: {home}/a/checkpoint.pt: File too large\n"
    assert {path.name: path.read_bytes() for path in (home / "a").iterdir()} == before
