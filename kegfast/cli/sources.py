"""Sources of samples by the names that the command line uses."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from kegfast.data import DataInfo

NAMES = ("uniform", "gaussian", "leaves", "real")
HELP = (
    "generators.safetensors, uniform or gaussian noise, leaves (images of random shapes), or real (the "
    "training samples of --data, without their labels); several are mixed in equal shares"
)


def make_source(names: list[str], info: "DataInfo", args: argparse.Namespace, device: "torch.device") -> Any:
    """The source that the names describe, alone or as a mixture.

    Raises:
        OSError, ValueError: a name is unknown, its data is missing, or its samples have another shape.
    """
    from kegfast.distillation import Mixture

    sources = [_make(name, info, args, device) for name in names]
    return sources[0] if len(sources) == 1 else Mixture(sources)


def _make(name: str, info: "DataInfo", args: argparse.Namespace, device: "torch.device") -> Any:
    from kegfast import Generators, data, distillation
    from kegfast.extraction.procedural import DeadLeaves

    shape = info.sample_shape
    if name == "uniform":
        return distillation.UniformNoise(shape, -(3**0.5), 3**0.5, device=device)  # variance 1
    if name == "gaussian":
        return distillation.GaussianNoise(shape, device=device)
    if name == "leaves":
        if not info.mean:
            raise ValueError(
                "source leaves needs images and their normalization: --data, or --mean and --std"
            )
        return DeadLeaves(shape, info.mean, info.std, device=device)
    if name == "real":
        if args.data is None:
            raise ValueError("source real needs --data")
        return distillation.InMemory(data.load(args.data, args.root).train.tensors[0].to(device))
    if not Path(name).exists():
        raise ValueError(f"source must be {', '.join(NAMES)} or a file of generators, got {name!r}")
    generators = Generators.load(name).to(device)
    if generators.sample_shape != shape:
        raise ValueError(
            f"source must give samples of shape {shape}, got {generators.sample_shape} of {name}"
        )
    return generators
