"""Two networks of your own: a small one learns from a large one, on noise and a handful of real digits.

python examples/distill_digits.py
"""

import torch
from torch import nn

import kegfast
from kegfast.distillation import GaussianNoise, Mixture


def perceptron(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, width), nn.ReLU(), nn.Linear(width, 10))


def main(steps: int = 600) -> float:
    """Returns the student's percent of real digits right, of which it has seen 64."""
    torch.manual_seed(0)
    splits = kegfast.data.load("digits")
    teacher, student = perceptron(256), perceptron(32)
    kegfast.train(teacher, splits.train, steps=steps)
    few = splits.train.tensors[0][:64]
    source = Mixture([GaussianNoise(tuple(few.shape[1:])), few], weights=[1, 1])
    kegfast.distill(student, teacher, source, steps=steps)
    right = kegfast.evaluate(student, splits.test)
    print(f"teacher {kegfast.evaluate(teacher, splits.test):.1f} %, student {right:.1f} %")
    return right


if __name__ == "__main__":
    main()
