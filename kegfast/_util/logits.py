"""What classifiers answer, as logits: of two classes or more, and no probabilities."""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_log = logging.getLogger(__name__)

_ROUNDING = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far the sum of a row of probabilities may be from 1; elsewhere 1e-4."""


def two_classes(logits: Tensor) -> Tensor:  # (..., C) -> (..., max(C, 2))
    """A lone logit as those of two classes: 0, and itself. Their softmax is its sigmoid."""
    return F.pad(logits, (1, 0)) if logits.shape[-1] == 1 else logits


def are_probabilities(answers: Tensor) -> bool:  # (B, C)
    """Whether every row sums to one and has no value below zero; waits for the device."""
    if answers.ndim != 2 or answers.shape[1] < 2 or not answers.is_floating_point() or not answers.numel():
        return False
    off = (answers.float().sum(1) - 1).abs().amax()
    return bool((off <= _ROUNDING.get(answers.dtype, 1e-4)) & (answers.amin() >= 0))


class AsLogits:
    """Makes logits of a model's answers: the logarithm, where its first ones are probabilities.

    A softmax at a network's end would be taken by another one. Logarithms of probabilities are the logits,
    but for a constant per row: `softmax(log(p) / T)` is what `softmax(z / T)` is. Anything but a table of
    numbers stays as it is.

    Args:
        name: the model's, for the log.
    """

    def __init__(self, name: str):
        self.name = name
        self._logarithm: bool | None = None

    def __call__(self, answers: Any) -> Any:
        if self._logarithm is None and isinstance(answers, Tensor) and not torch.compiler.is_compiling():
            self._logarithm = are_probabilities(answers.detach())
            if self._logarithm:
                _log.warning("%s answers with probabilities: their logarithms are taken as logits", self.name)
        if not self._logarithm:
            return answers
        return answers.clamp(min=torch.finfo(answers.dtype).tiny).log()
