"""The frozen classifier that knowledge is extracted from."""

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kegfast._util.check import expected
from kegfast.extraction.moments import NormMoments, watched_norm

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FrozenTeacher:
    """A private copy of a classifier whose parameters ask for no gradient.

    The caller's module is never touched: neither its mode nor its gradients, hooks or memory format.
    Gradients flow through the copy to its input.

    Args:
        teacher: The classifier.
        watch: Whether to collect the moments of what the BatchNorm layers are given.
        faithful: Whether it stays in train mode, as in the authors' experiments: BatchNorm layers
            normalise by the batch at hand, dropout drops. Each generator's samples are then a batch of
            their own, so that generators stay independent. Otherwise the copy is in eval mode.
    """

    def __init__(self, teacher: nn.Module, watch: bool, faithful: bool = False):
        if not isinstance(teacher, nn.Module):
            raise TypeError(expected("teacher", "a torch.nn.Module", teacher))
        if watch and faithful:
            raise ValueError(expected("faithful", "False with a term on BatchNorm statistics", faithful))
        self.model = copy.deepcopy(teacher).train(faithful).requires_grad_(False)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        self.faithful = faithful
        self._copies = 1
        self._moments: list[NormMoments] = []
        for layer in self.model.modules():
            if watch and isinstance(layer, _BATCH_NORMS) and layer.running_mean is not None:
                setattr(layer, "forward", partial(self._watch, layer))  # noqa: B010

    def _watch(self, layer: _BatchNorm, x: Tensor) -> Tensor:
        y, moments = watched_norm(x, layer, self._copies)
        self._moments.append(moments)
        return y

    def __call__(
        self,
        samples: Tensor,  # (G * N, ...)
        copies: int = 1,
    ) -> tuple[Tensor, list[NormMoments]]:
        """Logits (G * N, classes), and the moments that the BatchNorm layers saw of each of G = `copies`."""
        self._copies, self._moments = copies, []
        parts = samples.chunk(copies) if self.faithful else [samples]
        logits = [self.model(part) for part in parts]
        moments, self._moments = self._moments, []
        return logits[0] if len(logits) == 1 else torch.cat(logits), moments

    @property
    def device(self) -> torch.device:
        """The device of the parameters; the CPU where there are none."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def check(self, num_classes: int, sample_shape: Sequence[int], device: torch.device) -> None:
        """Raises ValueError unless samples of that shape give finite logits of that many classes."""
        probe = torch.zeros(2, *sample_shape, device=device)
        self.model.eval()
        try:
            logits, _ = self(probe)
        except (RuntimeError, ValueError, IndexError) as error:
            what = f"a shape that the teacher takes ({error})"
            raise ValueError(expected("sample_shape", what, tuple(sample_shape))) from error
        finally:
            self.model.train(self.faithful)
        if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
            what = f"a classifier whose logits are (N, num_classes = {num_classes})"
            raise ValueError(expected("teacher", what, logits))
        if not bool(logits.isfinite().all()):
            raise ValueError(expected("teacher", "a classifier with finite logits", logits))
