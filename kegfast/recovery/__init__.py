"""From a trained classifier to a small one that answers alike, with or without data: `kegfast.shrink`."""

from kegfast.recovery.front import shrink
from kegfast.recovery.prediction import Prediction
from kegfast.recovery.report import ShrinkReport

__all__ = ["Prediction", "ShrinkReport", "shrink"]
