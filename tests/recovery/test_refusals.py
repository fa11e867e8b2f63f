"""What shrink does not take, it says in one line that names the argument, before it works."""

from dataclasses import dataclass

import pytest
import torch
from small_models import perceptron
from torch import nn

import kegfast


class Wrapped(nn.Module):
    """The given model, its output changed."""

    def __init__(self, change, classes: int = 3):
        super().__init__()
        self.inner, self.change = perceptron(8, 16, classes), change

    def forward(self, x):
        return self.change(self.inner(x))


@dataclass
class Output:
    logits: torch.Tensor


IMAGES = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
ROWS = perceptron(8, 64, 3)


@pytest.mark.parametrize(
    ("model", "shape", "options", "error", "message"),
    [
        (3, (8,), {}, TypeError, "model must be a torch.nn.Module"),
        (Wrapped(lambda y: (y, y)), (8,), {}, TypeError, "model must be .* returns its logits, got a tuple"),
        (Wrapped(Output), (8,), {}, TypeError, "model must be .* returns its logits, got Output"),
        (Wrapped(lambda y: y.sum(1)), (8,), {}, ValueError, r"model must be .*\(N, classes\)"),
        (perceptron(8, 16, 1), (8,), {}, ValueError, "model must be .* two classes or more"),
        (Wrapped(lambda y: y * torch.nan), (8,), {}, ValueError, "model must give finite logits"),
        (perceptron(8, 16, 3).double(), (8,), {}, TypeError, "model must be of float32"),
        (ROWS, (9,), {}, ValueError, "sample_shape must be a shape that the model takes"),
        (ROWS, (8,), {"num_classes": 4}, ValueError, "num_classes must be 3"),
        (ROWS, (8,), {"ratio": 1.0}, ValueError, "ratio must be a finite number above 1"),
        (ROWS, (8,), {"ratio": 1000.0}, ValueError, "ratio must be at most"),
        (ROWS, (8,), {"ratio": 2.0, "budget": {"params": 0.5}}, ValueError, "ratio must be left out"),
        (ROWS, (8,), {"budget": {"parms": 0.5}}, ValueError, "budget must be one of"),
        (ROWS, (8,), {"mean": 0.5, "std": 0.5}, ValueError, "mean must be left out"),
        (ROWS, (8,), {"seconds": 0}, ValueError, "seconds must be"),
        (ROWS, (8,), {"resume": True}, ValueError, "resume needs out"),
        (ROWS, (8,), {"data": torch.randn(20, 9)}, ValueError, "data must be what the model takes"),
        (ROWS, (8,), {"data": 3}, TypeError, "data must be a tensor"),
        (ROWS, (8,), {"data": torch.full((20, 8), torch.inf)}, ValueError, "data must be"),
        (ROWS, (8,), {"source": torch.randn(20, 9)}, ValueError, "source must be samples of shape"),
        (IMAGES, (3, 8, 8), {"mean": 0.5}, ValueError, "mean and std must be given together"),
        (IMAGES, (3, 8, 8), {"mean": (0.5, 0.5), "std": 0.2}, ValueError, "mean must be a number or 3"),
        (IMAGES, (3, 8, 8), {"mean": 0.5, "std": 0.0}, ValueError, "std must be a finite number above 0"),
        (IMAGES, (3, 8, 8), {"input_range": (1, 0)}, ValueError, "input_range must be"),
        (
            IMAGES,
            (3, 8, 8),
            {"mean": 0.5, "std": 0.25, "data": 255 * torch.rand(20, 3, 8, 8)},
            ValueError,
            r"data must be normalized as mean and std say, in \[-2, 2\], got values",
        ),
    ],
)
def test_one_line_names_the_argument(model, shape, options, error, message, tmp_path):
    with pytest.raises(error, match=message) as caught:
        kegfast.shrink(model, shape, out=None if "resume" in options else tmp_path / "run", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "plan.json").exists()
