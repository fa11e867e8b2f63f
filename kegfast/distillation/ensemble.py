"""Several teachers as one."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kegfast._util import check
from kegfast._util.check import expected
from kegfast._util.logits import AsLogits, two_classes
from kegfast.distillation.precision import wide


class Ensemble(nn.Module):
    """The weighted average of several models' answers, as logits.

    Hinton, Vinyals and Dean (2015, section 2) average the teachers' predictive distributions,
    arithmetically (`"probabilities"`) or geometrically (`"logits"`). In the first case the output
    is `T log(sum_k w_k softmax(z_k / T))`, so that a softmax at this temperature T gives the average back.

    Args:
        models: At least one; all put out (B, C), logits or probabilities.
        weights: One number above 0 per model, scaled to sum to one; equal when None.
        average: `"probabilities"` or `"logits"`.
        temperature: T of the average over probabilities.

    Raises:
        TypeError, ValueError: An argument is none of these.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        weights: Sequence[float] | None = None,
        *,
        average: Literal["probabilities", "logits"] = "probabilities",
        temperature: float = 1.0,
    ):
        super().__init__()
        if not models or not all(isinstance(model, nn.Module) for model in models):
            raise ValueError(expected("models", "one module or more", models))
        if average not in ("probabilities", "logits"):
            raise ValueError(expected("average", "'probabilities' or 'logits'", average))
        check.number("temperature", temperature, above=0)
        self.models = nn.ModuleList(models)
        self._as_logits = [AsLogits(f"model {i} of the ensemble") for i in range(len(models))]
        self.average, self.temperature = average, temperature
        shares = torch.tensor(check.shares("weights", weights, len(models)))
        device = next((p.device for p in self.parameters()), None)
        self.weights: Tensor
        self.register_buffer("weights", shares.to(device))

    def forward(self, *inputs: Any, **named: Any) -> Tensor:  # -> (B, C)
        models = zip(self.models, self._as_logits, strict=True)
        answers = [as_logits(model(*inputs, **named)) for model, as_logits in models]
        for answer in answers:
            if not isinstance(answer, Tensor):
                raise TypeError(expected("models", "models that give logits, one tensor each", answer))
        logits = torch.stack(list(map(wide, answers)))  # (K, B, C)
        weights = self.weights.to(logits.dtype).view(-1, 1, 1)
        if self.average == "logits":
            return (weights * logits).sum(dim=0)
        log_probabilities = (two_classes(logits) / self.temperature).log_softmax(dim=2)
        average = self.temperature * (log_probabilities + weights.log()).logsumexp(dim=0)
        return average if logits.shape[2] > 1 else average.diff(dim=1)
