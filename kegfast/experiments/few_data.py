"""Each loss with little data: a part of boundary's experiment."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from kegfast.experiments.lenets import PAPER, Budget, Learning, Loss
from kegfast.experiments.trial import part
from kegfast.training import evaluate

LOSSES: dict[str, Loss] = {
    "alone": "hard_label",
    "soft_target": "hard_label+soft_target",
    "logit_regression": "hard_label+logit_regression",
    "noisy_logits": "hard_label+noisy_logits",
    # On the last embedding, as in the paper: on the logits the angles drive this student into one point.
    "rkd": "hard_label+rkd_distance@fc1:25+rkd_angle@fc1:50",
    "hint": "hard_label+soft_target",  # after a stage on conv2's features
    "boundary": PAPER,
}
"""What each student minimizes; all of them see the labels."""

HINT_LAYERS = "conv2"


@dataclass(frozen=True)
class Config(Budget):
    """What the results depend on.

    Attributes:
        shares: Parts of the training set that students see.
        steps: Of each student, whatever its share; a hint's stage has a third of them.
        methods: Keys of `LOSSES`.
    """

    batch_size: int = 32
    shares: tuple[float, ...] = (0.01, 0.1)
    steps: int = 1200
    methods: tuple[str, ...] = tuple(LOSSES)


class Run(Learning[Config]):
    """All cells of one seed."""

    def all(self) -> dict[str, float]:
        """Test accuracies in percent of every share and method."""
        found: dict[str, float] = {}
        for share in self.config.shares:
            for method in self.config.methods:
                name = f"{100 * share:g} %, {method}"
                found[name] = self.trial.cell(name, partial(self._accuracy, name, method, share))
        return found

    def _accuracy(self, name: str, method: str, share: float) -> float:
        config, first = self.config, self.config.steps // 3
        samples = part(self.splits.train, share, self.trial.seed)
        options: dict[str, Any] = {"steps": config.steps}
        if method == "hint":
            options = {"layers": HINT_LAYERS, "hint_steps": first, "steps": config.steps - first}
        return evaluate(self.student(name, LOSSES[method], samples, **options), self.splits.test)
