"""The frozen classifier that knowledge is extracted from."""

import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kegfast._util import check
from kegfast._util.check import expected
from kegfast._util.inputs import Inputs, copied
from kegfast._util.logits import AsLogits
from kegfast._util.modules import channels_last, clone, in_mode
from kegfast.extraction.moments import NormMoments, watched_norm
from kegfast.extraction.networks import Range

_log = logging.getLogger(__name__)

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PROBES = 8


class FrozenTeacher:
    """A private copy of a classifier, in float32, whose parameters ask for no gradient.

    The caller's module is never touched: neither its mode nor its gradients, hooks, dtype or memory format.
    Gradients flow through the copy to its input.

    Args:
        teacher: The classifier, to logits or probabilities, whose logarithms are taken then.
        watch: Whether to collect the moments of what the BatchNorm layers are given.
        faithful: Whether it stays in train mode, as in the authors' experiments: BatchNorm layers
            normalize by the batch at hand, dropout drops. Each generator's samples are then a batch of
            their own, so that generators stay independent. Otherwise the copy is in eval mode.

    Raises:
        TypeError, ValueError: It is no module, or both watched and faithful.
    """

    def __init__(self, teacher: nn.Module, watch: bool, faithful: bool = False):
        if not isinstance(teacher, nn.Module):
            raise TypeError(expected("teacher", "a torch.nn.Module", teacher))
        if watch and faithful:
            raise ValueError(expected("faithful", "False with a term on BatchNorm statistics", faithful))
        self.model = clone(teacher).train(faithful).float()
        for parameter in self.model.parameters():
            parameter.detach_().requires_grad_(False)  # TorchScript's copies are no leaves
        channels_last(self.model)
        self.faithful = faithful
        self._as_logits = AsLogits("teacher")
        self._copies = 1
        self._moments: list[NormMoments] = []
        for layer in self.model.modules() if watch else ():
            if isinstance(layer, _BATCH_NORMS) and layer.running_mean is not None:
                setattr(layer, "forward", partial(self._watch, layer))  # noqa: B010
            elif getattr(layer, "original_name", "").startswith("BatchNorm"):
                _log.warning("the BatchNorm statistics of a TorchScript teacher are not looked at")
                break

    def _watch(self, layer: _BatchNorm, input: Tensor) -> Tensor:
        y, moments = watched_norm(input, layer, self._copies)
        self._moments.append(moments)
        return y

    def __call__(
        self,
        samples: Inputs,  # (G * N, ...)
        copies: int = 1,
    ) -> tuple[Tensor, list[NormMoments]]:
        """Logits (G * N, classes), and the moments that the BatchNorm layers saw of each of G = `copies`."""
        self._copies, self._moments = copies, []
        parts = samples.chunk(copies) if self.faithful and isinstance(samples, Tensor) else [samples]
        answers = [self.model(copied(part)) for part in parts]
        moments, self._moments = self._moments, []
        return self._as_logits(answers[0] if len(answers) == 1 else torch.cat(answers)), moments

    @property
    def device(self) -> torch.device:
        """The device of the parameters; the CPU where there are none."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def check(
        self,
        num_classes: int,
        sample_shape: Sequence[int],
        device: torch.device,
        input_range: Range | None = None,
    ) -> Tensor:
        """Raises ValueError unless samples of that shape give finite logits of that many classes.

        Args:
            num_classes: How many.
            sample_shape: The shape of one sample.
            device: Where to try it.
            input_range: Samples are uniform in it; None takes them from N(0, 1).

        Returns:
            The samples that it was tried with, (n, *sample_shape), the same at every call.
        """
        probe = _probe(sample_shape, input_range).to(device)
        with torch.no_grad(), in_mode(self.model, training=False):
            try:
                logits, _ = self(probe)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                what = f"a shape that the teacher takes ({error})"
                raise ValueError(expected("sample_shape", what, tuple(sample_shape))) from error
        if not isinstance(logits, Tensor) or logits.shape != (len(probe), num_classes):
            what = f"a classifier whose logits are (N, num_classes = {num_classes})"
            raise ValueError(expected("teacher", what, logits))
        if not bool(logits.isfinite().all()):
            values = "N(0, 1)" if input_range is None else "input_range"
            raise ValueError(
                expected("teacher", f"a classifier with finite logits for samples from {values}", logits)
            )
        return probe

    def check_gradient(self, probe: Tensor) -> None:
        """Raises ValueError unless a gradient comes back to samples that `check` gave.

        Args:
            probe: (n, *sample_shape).
        """
        probe = probe.clone().requires_grad_()
        with torch.enable_grad(), in_mode(self.model, training=False), check.passes_gradient("teacher"):
            logits, _ = self(probe)
            weights = torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)
            (gradient,) = torch.autograd.grad(logits, probe, weights)
        if not bool(gradient.any()):
            raise ValueError(
                expected("teacher", "a model whose logits change with its samples", "a zero gradient")
            )


def _probe(sample_shape: Sequence[int], input_range: Range | None) -> Tensor:  # (n, *sample_shape)
    """Samples such as generators make, from a generator of its own."""
    draws = torch.Generator().manual_seed(0)
    if input_range is None:
        return torch.randn(_PROBES, *sample_shape, generator=draws)
    low, high = (
        torch.as_tensor(bound, dtype=torch.float32).expand(sample_shape[0]).view(-1, 1, 1)
        for bound in input_range
    )
    return low + (high - low) * torch.rand(_PROBES, *sample_shape, generator=draws)
