"""What a student is trained on: a weighted sum of losses, written as one line of text.

`"soft_target"`, `"soft_target + rkd_distance:25"`, `"hint@layers2=stage2:0.5"`: terms joined by `+`, each
a loss's name, the layers it looks at (`@student=teacher,...`; one path where both are called
alike) and its weight (`:number`, 1 by default).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kegfast._util import check
from kegfast._util.check import expected
from kegfast.distillation import boundary, feature_losses, logit, relational
from kegfast.distillation.batch import Batch
from kegfast.distillation.precision import wide


@dataclass
class Term:
    """One loss of an objective.

    Attributes:
        name: A name in `TERMS`, or any other with `loss` given.
        weight: A factor, or a function of the share of the run that is done, in [0, 1).
        layers: Pairs (path in the student, path in the teacher).
        loss: Called with (student logits, teacher logits, labels) instead of the loss called `name`.
    """

    name: str
    weight: float | Callable[[float], float] = 1.0
    layers: Sequence[tuple[str, str]] = ()
    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None

    def weight_at(self, done: float) -> float:
        return self.weight(done) if callable(self.weight) else self.weight


class Objective(nn.Module):
    """A sum of terms, with the regressors that its hints need as parameters.

    Args:
        loss: Text (see above), a function of (student logits, teacher logits, labels), or terms.
        temperature: For the terms that soften logits.
        alpha: Weight of the soft part of `soft_target` against the labels.

    Raises:
        ValueError: The text names an unknown loss, layers are missing, or a number is out of its range.
    """

    def __init__(
        self,
        loss: str | Callable[..., Tensor] | Sequence[Term] = "soft_target",
        *,
        temperature: float = 4.0,
        alpha: float = 1.0,
    ):
        super().__init__()
        check.number("temperature", temperature, above=0)
        check.number("alpha", alpha, least=0, most=1)
        self.terms = _terms(loss)
        self.settings = {"temperature": temperature, "alpha": alpha}
        self.regressors = nn.ModuleDict()

    @property
    def student_layers(self) -> set[str]:
        return {ours for term in self.terms for ours, _ in term.layers}

    @property
    def teacher_layers(self) -> set[str]:
        return {theirs for term in self.terms for _, theirs in term.layers}

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's logits alone do not suffice."""
        return bool(self.teacher_layers) or any(term.name == "boundary" for term in self.terms)

    def fit(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        """Create a regressor for every hint whose two layers differ in shape."""
        for term in self.terms:
            if term.name != "hint":
                continue
            for ours, theirs in term.layers:
                if student[ours].shape != teacher[theirs].shape:
                    regressor = feature_losses.make_regressor(student[ours], teacher[theirs])
                    self.regressors[_key(ours, theirs)] = regressor

    def parallelize(self) -> None:
        """Let the regressors average their gradients over the processes, as the student does."""
        for key, regressor in self.regressors.items():
            self.regressors[key] = DistributedDataParallel(regressor)

    def forward(self, batch: Batch, done: float = 0.0) -> dict[str, Tensor]:
        """Evaluate the terms; `"loss"` is their weighted sum."""
        weighted: list[Tensor] = []
        values: dict[str, Tensor] = {}
        for term in self.terms:
            weight = term.weight_at(done)
            if weight == 0:
                continue
            value = self._value(term, batch)
            weighted.append(weight * value)
            values[term.name] = values[term.name] + value if term.name in values else value
        if not values:
            raise ValueError(expected("loss", "at least one term with a weight", self.terms))
        total = _sum(weighted)
        return {"loss": total} if len(self.terms) == 1 else {"loss": total, **values}

    def _value(self, term: Term, batch: Batch) -> Tensor:
        if term.loss is not None:
            value = term.loss(batch.student, batch.teacher, batch.labels)
            if not isinstance(value, Tensor) or value.dim():
                raise TypeError(expected(f"the value of loss {term.name}", "a scalar tensor", value))
            return value
        return TERMS[term.name](self, term, batch)

    def regress(self, ours: str, theirs: str, features: Tensor) -> Tensor:
        """The student's features as the teacher's shape has them."""
        key = _key(ours, theirs)
        return self.regressors[key](wide(features)) if key in self.regressors else features


def _sum(values: Iterable[Tensor]) -> Tensor:
    """Of one value at least."""
    return reduce(torch.add, values)


def _soft_target(objective: Objective, term: Term, batch: Batch) -> Tensor:
    return logit.soft_target(batch.student, batch.teacher, batch.labels, **objective.settings)


def _decoupled(objective: Objective, term: Term, batch: Batch) -> Tensor:
    temperature = objective.settings["temperature"]
    return logit.decoupled(batch.student, batch.teacher, batch.labels, temperature=temperature)


def _hard_label(objective: Objective, term: Term, batch: Batch) -> Tensor:
    return logit.hard_label(batch.student, batch.teacher, batch.labels)


def _on_logits(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda objective, term, batch: loss(batch.student, batch.teacher)


def _pairs(term: Term, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    return [(batch.student_features[s], batch.teacher_features[t]) for s, t in term.layers]


def _on_features(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The loss summed over the pairs of layers; on the logits where none is named."""

    def total(objective: Objective, term: Term, batch: Batch) -> Tensor:
        return _sum(loss(*pair) for pair in _pairs(term, batch) or [(batch.student, batch.teacher)])

    return total


def _hint(objective: Objective, term: Term, batch: Batch) -> Tensor:
    return _sum(
        feature_losses.hint(
            objective.regress(ours, theirs, batch.student_features[ours]),
            batch.teacher_features[theirs],
        )
        for ours, theirs in term.layers
    )


def _fsp(objective: Objective, term: Term, batch: Batch) -> Tensor:
    """Between each named layer and the next."""
    ours, theirs = zip(*_pairs(term, batch), strict=True)
    return _sum(
        feature_losses.fsp(student, teacher)
        for student, teacher in zip(pairwise(ours), pairwise(theirs), strict=True)
    )


def _boundary(objective: Objective, term: Term, batch: Batch) -> Tensor:
    return boundary.boundary_loss(batch)


TERMS: dict[str, Callable[[Objective, Term, Batch], Tensor]] = {
    "soft_target": _soft_target,
    "hard_label": _hard_label,
    "logit_regression": _on_logits(logit.logit_regression),
    "noisy_logits": _on_logits(logit.noisy_logits),
    "decoupled": _decoupled,
    "hint": _hint,
    "attention_transfer": _on_features(feature_losses.attention_transfer),
    "fsp": _fsp,
    "rkd_distance": _on_features(relational.rkd_distance),
    "rkd_angle": _on_features(relational.rkd_angle),
    "boundary": _boundary,
}
"""Every loss that an objective can name."""

_LEAST_LAYERS = {"hint": 1, "attention_transfer": 1, "fsp": 2}


def parse(text: str) -> list[Term]:
    """Read `"name[@student[=teacher],...][:weight] + ..."`."""
    return [_parse_term(part.strip()) for part in text.split("+")]


def _parse_term(text: str) -> Term:
    head, colon, weight = text.partition(":")
    name, _, layers = head.partition("@")
    name = name.strip()
    if name not in TERMS:
        raise ValueError(expected("loss", f"made of {', '.join(TERMS)}", text))
    pairs = [_parse_layer(layer) for layer in layers.split(",") if layer.strip()]
    _check_layers(name, pairs, text)
    if not colon:
        return Term(name, boundary.boundary_weight if name == "boundary" else 1.0, pairs)
    try:
        factor = float(weight)
    except ValueError:
        factor = math.nan
    if not 0 <= factor < math.inf:
        raise ValueError(expected("loss", f"'{name}:<weight>', a number of at least 0", text))
    return Term(name, factor, pairs)


def _parse_layer(text: str) -> tuple[str, str]:
    ours, _, theirs = text.partition("=")
    return ours.strip(), (theirs or ours).strip()


def _check_layers(name: str, pairs: Sequence[tuple[str, str]], got: Any) -> None:
    least = _LEAST_LAYERS.get(name, 0)
    if len(pairs) < least:
        example = ",".join(["layer"] * least)
        raise ValueError(expected("loss", f"'{name}@{example}', with its layers named", got))


def _terms(loss: Any) -> list[Term]:
    if isinstance(loss, str):
        return parse(loss)
    if callable(loss):
        return [Term(getattr(loss, "__name__", "loss"), loss=loss)]
    terms = list(loss) if isinstance(loss, Sequence) else []
    if not terms or not all(isinstance(term, Term) for term in terms):
        raise TypeError(expected("loss", "text, a function or a list of Term", loss))
    for term in terms:
        if not callable(term.weight):
            check.number("weight", term.weight)
        if term.loss is None:
            if term.name not in TERMS:
                raise ValueError(expected("loss", f"made of {', '.join(TERMS)}", term.name))
            _check_layers(term.name, term.layers, term)
    return terms


def _key(ours: str, theirs: str) -> str:
    return f"{ours}={theirs}".replace(".", "/")  # a module's name has no dots
