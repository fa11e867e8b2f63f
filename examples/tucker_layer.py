"""Put fused Tucker-2 layers into a network of your own, fold it, and see how long a call takes.

python examples/tucker_layer.py
"""

import time

import torch
from torch import nn

import kegfast


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, stride=2, padding=1),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, 128, 3, padding=1),
        nn.ReLU(),
    ).eval()


@torch.no_grad()
def milliseconds(model: nn.Module, x: torch.Tensor, calls: int = 50) -> float:
    model(x)
    start = time.perf_counter()
    for _ in range(calls):
        model(x)
    return (time.perf_counter() - start) / calls * 1e3


def main() -> tuple[float, float]:
    """Returns milliseconds a call of the dense network and of its student."""
    torch.manual_seed(0)
    model, x = network(), torch.randn(8, 3, 56, 56).contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    student, _ = kegfast.compress(model, 0.25, example_input=x)
    student = kegfast.fuse(student)
    times = milliseconds(model, x), milliseconds(student, x)
    print("dense {:.2f} ms, student {:.2f} ms".format(*times))
    return times


if __name__ == "__main__":
    main()
