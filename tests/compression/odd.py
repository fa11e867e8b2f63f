"""A model that compression was not made for: nested, shared, grouped, dilated, reflected and tiny layers."""

import torch
from torch import Tensor, nn


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding="same", padding_mode="reflect")
        self.norm = nn.BatchNorm2d(16)
        dilated = nn.Conv2d(16, 32, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False)
        self.block = nn.Sequential(nn.Sequential(dilated, nn.BatchNorm2d(32)), nn.ReLU())
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.shared = nn.Conv2d(32, 32, 3, padding=1)
        self.alias = self.shared
        self.pointwise = nn.Conv2d(32, 48, 1, stride=2)
        self.tiny = nn.Conv2d(48, 1, 1)
        self.unused = nn.Conv2d(8, 8, 3)
        self.scale = nn.Parameter(torch.ones(1))
        self.fc = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, 10)
        x = self.block(torch.relu(self.norm(self.stem(x))))
        x = self.grouped(x) + self.depthwise(x)
        x = self.pointwise(self.alias(torch.relu(self.shared(x))))
        return self.fc(x.mean((2, 3))) * self.scale + self.tiny(x).mean()


def odd(seed: int = 0) -> Odd:
    """An Odd with statistics and weights that a trained one could have."""
    torch.manual_seed(seed)
    model = Odd()
    randomise_norms(model)
    return model.eval()


def randomise_norms(model: nn.Module) -> None:
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
