"""What the command line says about wrong input: one line, exit code 2, nothing left behind."""

import numpy as np
import pytest
import torch
from cli_support import last_line, run
from torch import nn

from kegfast._util.files import save_tensors


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
        ("train MINE --lr -1", "lr must be a finite number above 0"),
        ("train MINE --seed 99999999999999999999", "argument --seed: invalid 64-bit int value"),
        ("train MINE --lr nan", "argument --lr: invalid number value: 'nan'"),
        ("train MINE --epochs -1", "epochs must be a finite number above 0"),
        ("train MINE --weight-decay -1", "weight_decay must be a finite number of at least 0"),
        ("train MINE --label-smoothing 7", "label_smoothing must be a number in [0, 1]"),
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
        ("extract TEACHER --sample-shape 0 --num-classes 3", "sample-shape must be"),
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
        ("compress TEACHER --budget flops=0.4", "example must be given with a budget of flops: --example"),
        ("compress TEACHER --example 1,x", "example must be a shape"),
        ("compress TEACHER --example 0,6", "example must be a shape"),
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
         "--source real --temperature 0", "temperature must be a finite number above 0"),
        ("demo --generators 0", "generators must be a positive int"),
        ("demo --student-steps 0", "student_steps must be a positive int"),
        ("reproduce mnist --steps 0", "argument --steps: invalid positive int value: '0'"),
        ("reproduce mnist --budget-seconds nan", "argument --budget-seconds: invalid number value"),
        ("bench", "are required: name"),
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
