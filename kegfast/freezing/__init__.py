"""Whole networks as one native call: `freeze`, and what it makes."""

from kegfast.freezing.frozen import Frozen, StepCost
from kegfast.freezing.pipeline import freeze

__all__ = ["Frozen", "StepCost", "freeze"]
