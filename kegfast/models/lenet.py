"""LeNet5 (LeCun et al. 1998) with ReLU and max-pooling."""

import torch.nn.functional as F
from torch import Tensor, nn

from kegfast._util import check


class LeNet5(nn.Module):
    """Three 5x5 convolutions (6, 16, 120 channels) and two linear layers (84, classes); 61,706 parameters.

    Args:
        in_channels: channels of the images.
        num_classes: number of logits.

    Raises:
        TypeError, ValueError: one of them is no positive int.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        check.counts(in_channels=in_channels, num_classes=num_classes)
        self.conv1 = nn.Conv2d(in_channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.conv3 = nn.Conv2d(16, 120, 5)
        self.fc1 = nn.Linear(120, 84)
        self.fc2 = nn.Linear(84, num_classes)

    def forward(
        self,
        x: Tensor,  # (N, in_channels, 32, 32)
    ) -> Tensor:
        """Logits (N, num_classes)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x)).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))
