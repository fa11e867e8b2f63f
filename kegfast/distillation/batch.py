"""What one step of distillation is about."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from kegfast._util.inputs import Inputs


@dataclass
class Batch:
    """One step's tensors, as losses see them."""

    samples: Inputs  # (B, ...) each
    labels: Tensor | None  # (B,)
    student: Tensor  # (B, C) logits
    teacher: Tensor  # (B, C) logits
    student_features: Mapping[str, Tensor] = field(default_factory=dict)
    teacher_features: Mapping[str, Tensor] = field(default_factory=dict)
    ask_student: Callable[[Inputs], Tensor] | None = None
    """Logits of other samples, past DistributedDataParallel, whose forward pass waits for other processes."""
    ask_teacher: Callable[[Inputs], Tensor] | None = None
