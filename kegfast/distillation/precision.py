"""Half-precision inputs: losses are computed in float32 or wider whatever the models ran in."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """A half-precision tensor in float32; any other as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which matrix products keep their inputs' precision."""
    return torch.autocast(x.device.type, enabled=False)
