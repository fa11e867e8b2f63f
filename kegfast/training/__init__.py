"""Training of classifiers, and the loop, the checkpoints and the processes that every run shares."""

from kegfast.training.classifier import evaluate, gather, random_shift, train, warmup_cosine

__all__ = ["evaluate", "gather", "random_shift", "train", "warmup_cosine"]
