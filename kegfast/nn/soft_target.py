"""The soft-target loss as a module."""

from torch import Tensor, nn

from kegfast import functional
from kegfast._util import check


class SoftTargetLoss(nn.Module):
    """`kegfast.functional.soft_target` as a module: T^2 KL(teacher || student), averaged over the batch.

    Args:
        temperature: T, above 0. 4 softens logits of classifiers as most of the field does.

    Raises:
        TypeError, ValueError: for a temperature that is no positive number.
    """

    def __init__(self, temperature: float = 4.0):
        super().__init__()
        self.temperature = check.number("temperature", temperature, above=0)

    def forward(
        self,
        student: Tensor,  # (B, C) logits
        teacher: Tensor,  # (B, C) logits
    ) -> Tensor:  # ()
        """The loss; the student's logits alone receive gradients."""
        return functional.soft_target(student, teacher, self.temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
