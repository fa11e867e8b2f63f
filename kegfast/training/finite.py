"""Where a loss that is no number may come from: what went into the steps is noted, and read only then."""

import torch
from torch import Tensor


class Given:
    """The sums of all tensors that went into a run, by the names of what gave them, on their device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def note(self, name: str, *tensors: Tensor) -> None:
        """Adds tensors that `name` gave; a NaN or an infinity among them stays in the sum."""
        for tensor in tensors:
            if tensor.is_floating_point():
                dtype = torch.promote_types(tensor.dtype, torch.float32)
                total = tensor.detach().sum(dtype=dtype)
                self._sums[name] = self._sums[name] + total if name in self._sums else total

    def wrong(self) -> str | None:
        """The first that gave what is not finite; waits for the device."""
        return next((name for name, total in self._sums.items() if not bool(total.isfinite())), None)
