"""Ordinary supervised training of a classifier, and its accuracy."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from kegfast._util import check
from kegfast._util.check import accepts, expected
from kegfast._util.logits import AsLogits, two_classes
from kegfast._util.modules import in_mode
from kegfast.training.finite import Given
from kegfast.training.loop import MetricsLog, mix, run_steps
from kegfast.training.optimizers import MakeOptimizer, OptimizerName, make_optimizer

WARMUP = 0.05
"""Share of the steps in which the learning rate rises."""


def train(
    model: nn.Module,
    dataset: Dataset,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 128,
    optimizer: OptimizerName | MakeOptimizer = "adamw",
    lr: float | None = None,
    weight_decay: float = 5e-4,
    label_smoothing: float = 0.0,
    shift: int = 0,
    augment: Callable[[Tensor], Tensor] | None = None,
    amp: bool = False,
    device: torch.device | str | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    metrics: MetricsLog | None = None,
    progress: bool = False,
    label: str = "train",
    log_every: int = 10,
) -> list[dict[str, float]]:
    """Train `model` in place with cross entropy; the learning rate rises linearly and falls as a cosine.

    Every epoch visits the samples once, but for an incomplete last batch, in an order that depends on the
    seed and the epoch alone.

    Args:
        model: maps samples to logits (N, num_classes); a lone logit speaks for class 1 against class 0, and
            of probabilities the logarithms are taken.
        dataset: samples and integer labels from 0.
        steps: optimizer steps; give these or `epochs`.
        epochs: passes over the data.
        batch_size: samples of a step.
        optimizer: "adamw", "adam" or "sgd" with Nesterov momentum 0.9, or a function from the list of
            parameters to a torch optimizer, which then brings its own lr and weight_decay.
        lr: the highest learning rate; by default 2e-3 for AdamW and Adam and 0.1 for SGD.
        weight_decay: as the optimizer defines it; not applied to biases and normalization (tensors of
            one dimension).
        label_smoothing: share of the target spread over all classes.
        shift: images are moved by up to this many pixels per axis at random; edges are repeated.
        augment: changes every batch of samples; its draws must come from torch's global generator.
        amp: compute in bfloat16 where that is safe (torch.autocast).
        device: where to train; by default where the model is.
        seed, checkpoint, resume, metrics, progress, label, log_every: see `kegfast.training.loop.run_steps`.

    Returns:
        The history: entries with `step`, `loss` and `lr`.

    Raises:
        TypeError, ValueError: an argument is wrong, or samples, labels and logits do not fit.
        FloatingPointError: the loss became NaN or infinite.
    """
    size = _size(dataset)
    batch_size = min(check.count("batch_size", batch_size), size)
    per_epoch = size // batch_size
    if (steps is None) == (epochs is None):
        raise ValueError(f"steps or epochs must be given, one of them, got {steps} and {epochs}")
    check.number("weight_decay", weight_decay, least=0)
    check.number("label_smoothing", label_smoothing, least=0, most=1)
    check.count("shift", shift, least=0)
    if augment is not None and not callable(augment):
        raise TypeError(expected("augment", "a function of samples", augment))
    if epochs is not None:
        steps = math.ceil(check.number("epochs", epochs, above=0) * per_epoch)
    total = check.count("steps", steps)
    place = _place(model, device)
    if lr is None:
        lr = 0.1 if optimizer == "sgd" else 2e-3
    updates = make_optimizer(
        optimizer, check.trained("model", model), lr=lr, weight_decay=weight_decay, decay_vectors=False
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(updates, warmup_cosine(total))
    order, given, as_logits = _Order(size, seed), Given(), AsLogits("model")

    def step(i: int) -> Mapping[str, Tensor | float]:
        epoch, start = divmod(i * batch_size, per_epoch * batch_size)
        x, classes = gather(dataset, order(epoch)[start : start + batch_size])
        x, labels = x.to(place), classes.to(place, torch.int64)
        given.note("dataset", x)
        if shift:
            x = random_shift(x, shift)
        if augment is not None:
            x = augment(x)
        with torch.autocast(place.type, torch.bfloat16, enabled=amp), accepts("dataset", x):
            logits = as_logits(model(x))
        logits = _of_classes(logits)
        if i % per_epoch == 0 or classes.is_cpu:  # elsewhere it waits for the device
            _check_labels(logits, classes)
        check.depends("model", logits)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
        updates.zero_grad(set_to_none=True)
        loss.backward()
        updates.step()
        rate = schedule.get_last_lr()[0]
        schedule.step()
        return {"loss": loss.detach(), "lr": rate}

    with in_mode(model, training=True):
        return run_steps(
            step, total, state={"model": model, "optimizer": updates, "schedule": schedule},
            given=given, seed=seed, checkpoint=checkpoint, resume=resume, metrics=metrics, progress=progress,
            label=label, log_every=log_every,
        )  # fmt: skip


def evaluate(
    model: nn.Module,
    data: Dataset | DataLoader,
    *,
    batch_size: int = 128,
    amp: bool = False,
    device: torch.device | str | None = None,
) -> float:
    """Accuracy of `model` in percent, in eval mode.

    Args:
        model: maps samples to logits (N, num_classes), or to the one of class 1 against class 0.
        data: samples and integer labels, as a data set or a DataLoader.
        batch_size: samples at a time, of a data set; small ones stay in a CPU's caches (ResNet14: 128 takes
            a third of the time of 1000).
        amp: compute in bfloat16 where that is safe (torch.autocast).
        device: where to compute; by default where the model is.

    Raises:
        TypeError, ValueError: there is no data, samples, labels and logits do not fit, or a logit is NaN.
    """
    place = _place(model, device)
    check.count("batch_size", batch_size)
    right, total, undefined = 0, 0, torch.zeros((), dtype=torch.bool, device=place)
    with in_mode(model, training=False), torch.inference_mode():
        for x, labels in _batches(data, batch_size):
            with torch.autocast(place.type, torch.bfloat16, enabled=amp):
                x = x.to(place)
                with accepts("data", x):
                    logits = _of_classes(model(x))
            _check_labels(logits, labels)
            right = right + (logits.argmax(1) == labels.to(place)).sum()  # stays on the device
            undefined |= logits.isnan().any()
            total += len(labels)
    if total == 0:
        raise ValueError(expected("data", "one sample or more", total))
    if undefined:
        raise ValueError(expected("model", "a map to numbers", "NaN for some of the samples"))
    return 100.0 * float(right) / total


def warmup_cosine(steps: int) -> Callable[[int], float]:
    """The factor of the learning rate at each step: linear rise over `WARMUP`, then half a cosine to 0."""
    warmup = max(1, round(WARMUP * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (steps - warmup + 1)))

    return factor


def random_shift(
    x: Tensor,  # (N, C, H, W)
    pixels: int,
) -> Tensor:
    """Move every image by its own whole number of pixels in [-pixels, pixels] per axis, repeating edges."""
    if x.ndim != 4:
        raise ValueError(expected("x", "images (N, C, H, W), the only samples with a shift", x))
    n, _, height, width = x.shape
    offsets = torch.randint(-pixels, pixels + 1, (2, n, 1), device=x.device)
    rows = (torch.arange(height, device=x.device) + offsets[0]).clamp_(0, height - 1)  # (N, H)
    columns = (torch.arange(width, device=x.device) + offsets[1]).clamp_(0, width - 1)  # (N, W)
    images = torch.arange(n, device=x.device).view(n, 1, 1)
    moved = x.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def gather(
    dataset: Dataset,
    indices: Tensor,  # (n,) int64
) -> tuple[Tensor, Tensor]:
    """Samples and labels at some indices, as one batch."""
    if isinstance(dataset, TensorDataset):
        batch = [tensor[indices] for tensor in dataset.tensors]
    else:
        batch = default_collate([dataset[i] for i in indices.tolist()])
    return _pair(batch)


class _Order:
    """The permutation of each epoch; only the latest is kept."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = -1
        self.permutation = torch.empty(0)

    def __call__(self, epoch: int) -> Tensor:
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(mix(mix(self.seed, 0), epoch))
            self.epoch, self.permutation = epoch, torch.randperm(self.size, generator=generator)
        return self.permutation


def _batches(data: Dataset | DataLoader, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(data, DataLoader):
        yield from map(_pair, data)
        return
    for indices in torch.arange(_size(data)).split(batch_size):
        yield gather(data, indices)


def _pair(batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise TypeError(expected("dataset", "pairs of sample and label", type(batch)))
    x, labels = batch
    if not (isinstance(x, Tensor) and isinstance(labels, Tensor)):
        raise TypeError(expected("dataset", "pairs of tensors or numbers, sample and label", type(labels)))
    return x, labels


def _size(dataset: Dataset) -> int:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(expected("dataset", "a data set with __len__ and __getitem__", dataset))
    size = len(dataset)
    if size == 0:
        raise ValueError(expected("dataset", "one sample or more", size))
    return size


def _place(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """The device to use, to which the model is moved where one is given."""
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", model))
    if device is not None:
        model.to(check.device("device", device))
    parameter = next(model.parameters(), None)
    return check.device("device", device or "cpu" if parameter is None else parameter.device)


def _of_classes(answers: Any) -> Any:
    """A lone logit as those of two classes; what is no table of logits, as it is."""
    return two_classes(answers) if isinstance(answers, Tensor) and answers.ndim == 2 else answers


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    if labels.ndim != 1:
        raise ValueError(expected("labels", "of shape (N,), one class a sample", labels))
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels):
        raise ValueError(expected("model", f"a map to logits ({len(labels)}, classes)", logits))
    if labels.dtype is torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(expected("labels", "integers", labels))
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        wrong = low if low < 0 else high
        raise ValueError(expected("labels", f"0 to {logits.shape[1] - 1}, as the logits", wrong))
