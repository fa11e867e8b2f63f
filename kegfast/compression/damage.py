"""Whether a student that nobody gave a budget is still the network that it was made of."""

import warnings
from math import prod

from torch import nn

from kegfast.compression.allocation import distance, outputs_of
from kegfast.compression.evidence import Evidence
from kegfast.compression.report import CompressionReport

CHANGED = 0.5
"""A change of the outputs (squared error as a share of their variance, plus the share of other answers),
or a share of the weights' energy lost through all layers, at which a network answers mostly otherwise."""


def warn_of_damage(
    student: nn.Module, teacher: nn.Module, evidence: Evidence, report: CompressionReport
) -> None:
    """Says so, as a warning and in the report, where the outputs change by more than `CHANGED`.

    Without inputs to run the models on, by what is lost of the weights.
    """
    if not report.ranks:
        return
    if evidence.samples is not None:
        lost = distance(outputs_of(teacher, evidence.samples), outputs_of(student, evidence.samples))
        what = f"outputs and answers change by {lost:.2f}"
    else:
        lost = 1 - prod(1 - min(entry.error, 1.0) ** 2 for entry in report.layers)
        what = f"the layers lose {lost:.0%} of their weights' energy"
    if lost <= CHANGED:
        return
    text = f"{what}: the student answers mostly otherwise than the model. Give budget={{'params': share}}, or"
    text += " let kegfast.shrink choose and teach it"
    report.notes.append(text)
    warnings.warn(text, stacklevel=4)  # beyond what keeps the generators
