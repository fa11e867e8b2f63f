"""The frozen classifier that knowledge is extracted from."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kegfast.check import expected
from kegfast.extraction.terms import NormInput

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FrozenTeacher:
    """A private copy of a classifier: eval mode, no parameter asks for a gradient.

    The caller's module is never touched: neither its mode nor its gradients, hooks or memory format.
    Gradients flow through the copy to its input.

    Args:
        teacher: The classifier.
        watch: Whether to collect the inputs of the BatchNorm layers.
    """

    def __init__(self, teacher: nn.Module, watch: bool):
        if not isinstance(teacher, nn.Module):
            raise TypeError(expected("teacher", "a torch.nn.Module", teacher))
        self.model = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.model.to(memory_format=torch.channels_last)
        self._collected: list[NormInput] = []
        for layer in self.model.modules():
            if watch and isinstance(layer, _BATCH_NORMS) and layer.running_mean is not None:
                layer.register_forward_pre_hook(self._collect)

    def _collect(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._collected.append((layer, inputs[0]))

    def __call__(self, samples: Tensor) -> tuple[Tensor, list[NormInput]]:
        """Logits (N, classes) for samples (N, ...), and the inputs of the BatchNorm layers."""
        self._collected = []
        logits = self.model(samples)
        collected, self._collected = self._collected, []
        return logits, collected

    @property
    def device(self) -> torch.device:
        """The device of the parameters; the CPU where there are none."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def check(self, num_classes: int, sample_shape: Sequence[int], device: torch.device) -> None:
        """Raises ValueError unless samples of that shape give finite logits of that many classes."""
        probe = torch.zeros(2, *sample_shape, device=device)
        try:
            logits, _ = self(probe)
        except (RuntimeError, ValueError, IndexError) as error:
            what = f"a shape that the teacher takes ({error})"
            raise ValueError(expected("sample_shape", what, tuple(sample_shape))) from error
        if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
            what = f"a classifier whose logits are (N, num_classes = {num_classes})"
            raise ValueError(expected("teacher", what, logits))
        if not bool(logits.isfinite().all()):
            raise ValueError(expected("teacher", "a classifier with finite logits", logits))
