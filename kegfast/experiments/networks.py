"""Trained classifiers with real test data, on which `kegfast.shrink` is measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kegfast import data
from kegfast._util.check import expected
from kegfast._util.files import load_weights, save_tensors
from kegfast.data import DataInfo, Samples, Splits
from kegfast.data.splits import make_splits
from kegfast.models import MLP, CifarResNet, LeNet5, ResNet14
from kegfast.training.classifier import train

CIFAR = DataInfo("cifar10", 10, (3, 32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""CIFAR-10, by the normalization that the published ResNets expect."""


@dataclass(frozen=True)
class Network:
    """A teacher and its data.

    Attributes:
        build: makes the untrained network.
        splits: reads the data from a root folder.
        ratios: how many times fewer parameters its students shall have.
        weights: published weights under a folder of such; None: it is trained.
        training: how, as options of `kegfast.train`.
    """

    build: Callable[[], nn.Module]
    splits: Callable[[Path | None], Splits]
    ratios: tuple[float, ...]
    weights: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def teacher(self, splits: Splits, pretrained: Path | None, own: Path) -> nn.Module:
        """The network with its published weights; else with those of the file `own`, trained if missing."""
        model = self.build()
        if self.weights is not None:
            if pretrained is None:
                raise ValueError(f"pretrained must be given: the folder of {self.weights}")
            return load_weights(model, pretrained / self.weights).eval()
        if not own.exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = self.build()
            train(model, splits.train, checkpoint=own.with_suffix(".pt"), resume=True, **self.training)
            save_tensors(own, model.state_dict())
            own.with_suffix(".pt").unlink(missing_ok=True)
        return load_weights(model, own).eval()


def _named(name: str) -> Callable[[Path | None], Splits]:
    return lambda root: data.load(name, root)


def _cifar(root: Path | None) -> Splits:
    return _from_arrays(CIFAR, root, "cifar10", ("train_subset.npz", "test_subset.npz"))


STREET = ("street-digits", "street_digits.npz")
"""Folder and file of digits from street photographs, which stand in for SVHN's test set."""


def street_digits(root: str | Path | None) -> Splits | None:
    """What stands in for SVHN, under its own name: test images alone. None where `root` has no such file."""
    if root is None or not Path(root, *STREET).exists():
        return None
    info = replace(data.describe("svhn"), name=STREET[0])
    images, labels = (part.numpy() for part in _street_digits(Path(root)).test.tensors)
    none = Samples(images[:0], labels[:0], info)
    return Splits(none, none, Samples(images, labels, info))


def _street_digits(root: Path | None) -> Splits:
    """Too few to split: all are test images, and all are training images."""
    return _from_arrays(data.describe("svhn"), root, STREET[0], (STREET[1],) * 2)


def _from_arrays(info: DataInfo, root: Path | None, folder: str, files: tuple[str, str]) -> Splits:
    """Archives of `x` (n, H, W, C) uint8 and `y`."""
    if root is None:
        raise ValueError(f"root must be given: a folder with {folder}/{files[0]}")
    parts = []
    mean, std = (np.array(values, np.float32) for values in (info.mean, info.std))
    for file in files:
        with np.load(root / folder / file, allow_pickle=False) as found:
            pixels, labels = found["x"], found["y"]
        scaled = (pixels.astype(np.float32) / 255 - mean) / std
        parts.append((np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)), labels.astype(np.int64)))
    return make_splits(info, *parts)


def _table(name: str, steps: int, ratio: float) -> Network:
    info = data.describe(name)
    shape = info.sample_shape[0], info.num_classes
    return Network(lambda: MLP(*shape), _named(name), (ratio,), training={"steps": steps})


NETWORKS = {
    "lenet5-mnist": Network(LeNet5, _named("mnist"), (3.62, 4.5, 8.0), "kegnet/mnist.pth.tar"),
    "resnet14-fashion": Network(
        ResNet14, _named("fashion-mnist"), (1.58, 2.9, 5.7), "kegnet/fashion.pth.tar"
    ),
    "resnet20-cifar": Network(CifarResNet, _cifar, (2.0, 4.0), "cifar10/resnet20-12fca82f.th"),
    "resnet56-cifar": Network(lambda: CifarResNet(56), _cifar, (2.0, 4.0), "cifar10/resnet56-4bfd9763.th"),
    "resnet14-street": Network(
        lambda: ResNet14(3), _street_digits, (1.44, 1.65, 3.36), "kegnet/svhn.pth.tar"
    ),
    "lenet5-digits": Network(LeNet5, _named("digits"), (4.0,), training={"epochs": 60, "shift": 2}),
    "resnet14-digits": Network(ResNet14, _named("digits"), (3.5,), training={"epochs": 20, "shift": 2}),
    "mlp-pendigits": _table("pendigits", 8_000, 8.27),
    "mlp-letter": _table("letter", 8_000, 4.26),
    "mlp-shuttle": _table("shuttle", 8_000, 8.23),
}
"""By architecture and data."""


def network(name: str) -> Network:
    """One of `NETWORKS`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in NETWORKS:
        raise ValueError(expected("network", f"one of {', '.join(NETWORKS)}", name))
    return NETWORKS[name]
