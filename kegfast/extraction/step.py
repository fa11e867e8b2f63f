"""One training step of all generators: draw, judge, differentiate, update; no wait for the device."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kegfast._util.cuda_graph import Captured
from kegfast.extraction.generators import draw_labels
from kegfast.extraction.recipe import Recipe
from kegfast.extraction.teacher import FrozenTeacher
from kegfast.extraction.terms import Generated, GeneratorTerm


@dataclass
class GeneratorObjective:
    """The weighted sum of terms that one batch of all generators is judged by."""

    generator: nn.Module
    decoder: nn.Module
    teacher: FrozenTeacher
    terms: Sequence[GeneratorTerm] = field(default_factory=list)

    def __call__(
        self,
        labels: Tensor,  # (G, N, classes), at least 0
        noise: Tensor,  # (G, N, noise_size)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over generators, and for the log each term's mean over them."""
        samples = self.generator(labels, noise)
        logits, norms = self.teacher(samples.flatten(0, 1), len(noise))
        logits = logits.unflatten(0, noise.shape[:2])
        shares = labels / labels.sum(-1, keepdim=True)
        batch = Generated(shares, noise, samples, logits, self.decoder, norms)
        values = {term.name: term(batch) for term in self.terms}
        loss = torch.stack([term.weight * values[term.name] for term in self.terms]).sum(0)
        log = {"loss": loss, **values}
        log["agreement"] = (logits.argmax(-1) == labels.argmax(-1)).float()
        return loss.sum(), {name: value.detach().mean() for name, value in log.items()}


class Step:
    """`step(i)` draws labels and noise from torch's global generator and trains on them.

    The arguments' networks are those of the generators `own` out of `copies`: draws are made for all, so
    that a generator gets the same ones wherever it is trained.

    Args:
        objective: What the generators are judged by.
        recipe: Schedule, batch size and kind of labels.
        num_classes: The size of a label vector.
        noise_size: The size of a noise vector.
        copies: How many generators there are.
        own: Which of them are trained here; all when None.
        amp: Whether to compute in bfloat16 where torch's autocast deems it safe.
        capture: Whether to replay the training as one CUDA graph where it runs on a GPU.
        compile: Whether to pass the objective through `torch.compile`.
    """

    def __init__(
        self,
        objective: GeneratorObjective,
        recipe: Recipe,
        num_classes: int,
        noise_size: int,
        copies: int,
        own: slice | None = None,
        *,
        amp: bool = False,
        capture: bool = True,
        compile: bool = False,
    ):
        self.recipe, self.num_classes = recipe, num_classes
        self.noise_size, self.copies, self.own = noise_size, copies, own or slice(None)
        parameters = [*objective.generator.parameters(), *objective.decoder.parameters()]
        self.device = parameters[0].device
        on_gpu = self.device.type == "cuda"
        rate = torch.tensor(recipe.lr, device=self.device) if on_gpu else recipe.lr
        self.optimizer = torch.optim.Adam(parameters, lr=rate, fused=True, capturable=on_gpu)
        self.objective: Callable[..., tuple[Tensor, dict[str, Tensor]]] = objective
        if compile:
            self.objective = torch.compile(objective.__call__)
        # a captured step must not keep casts of weights that the next replay has updated
        self.autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=amp, cache_enabled=not (on_gpu and capture)
        )
        self.train = Captured(self._train) if on_gpu and capture else self._train

    def __call__(self, i: int) -> Mapping[str, Tensor]:
        labels, noise = self.draw()
        self._set_rate(self.recipe.lr * self._decay(i))
        return self.train(labels, noise)

    def draw(self) -> tuple[Tensor, Tensor]:  # (G, N, classes), (G, N, noise_size)
        """Labels and noise of one batch, for the own generators."""
        size = (self.copies, self.recipe.batch_size)
        labels = draw_labels(size, self.num_classes, self.recipe.labels, self.device)
        noise = torch.randn(*size, self.noise_size, device=self.device)
        return labels[self.own], noise[self.own]

    def _train(self, labels: Tensor, noise: Tensor) -> dict[str, Tensor]:
        with self.autocast:
            loss, log = self.objective(labels, noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return log

    def _decay(self, i: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * i / self.recipe.steps)) if self.recipe.cosine else 1.0

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
