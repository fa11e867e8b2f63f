"""Every loss between a teacher and a student, usable in any training loop.

Each takes the student's tensor first, sends gradients to it alone and computes in float32 or wider.
"""

from kegfast.distillation.feature_losses import (
    attention_map,
    attention_transfer,
    flow,
    fsp,
    hint,
    make_regressor,
)
from kegfast.distillation.logit import (
    decoupled,
    hard_label,
    logit_regression,
    noisy_logits,
    soft_target,
)
from kegfast.distillation.relational import rkd_angle, rkd_distance

__all__ = [
    "attention_map",
    "attention_transfer",
    "decoupled",
    "flow",
    "fsp",
    "hard_label",
    "hint",
    "logit_regression",
    "make_regressor",
    "noisy_logits",
    "rkd_angle",
    "rkd_distance",
    "soft_target",
]
