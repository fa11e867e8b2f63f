"""A frozen network as data: its steps, and the bytes that plans and files are made of (csrc/network.cpp)."""

import struct
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

KINDS = (
    "convolution", "tucker2", "conv_max_pool", "max_pool", "average_pool", "adaptive_average", "mean",
    "linear", "add", "multiply", "concatenate", "flatten", "activation", "softmax", "place", "affine",
)  # fmt: skip
ACTIVATIONS = "relu", "silu", "hardswish", "sigmoid", "tanh", "hardsigmoid", "relu6"
RELU = {"convolution": 7, "tucker2": 6, "conv_max_pool": 10, "linear": 0, "add": 0, "affine": 0}
"""Kinds whose last store may apply a ReLU, and which option says so."""
ADDEND = {"convolution", "tucker2", "linear"}
"""Kinds that may add a second operand before it."""

VERSION = 1
MOST_OPTION = 1 << 12
"""What a file's reader takes, so that no damaged one asks for all memory."""

_MAGIC = b"KEGPLAN\0"


@dataclass(eq=False)
class Step:
    """One step: what it computes of which values; `value` names what it makes."""

    kind: str
    operands: list[Hashable]
    options: list[int] = field(default_factory=list)  # as csrc/network.h lists them
    weights: list[Tensor | None] = field(default_factory=list)
    value: Hashable = None
    name: str = ""  # for people

    @property
    def rectified(self) -> bool:
        """Whether a ReLU is part of it."""
        return self.kind in RELU and bool(self.options[RELU[self.kind]])


def network_bytes(inputs: Sequence[Hashable], steps: Sequence[Step], outputs: Sequence[Hashable]) -> bytes:
    """The network of these steps, each of which uses inputs and values of steps before it."""
    places = {value: place for place, value in enumerate(inputs)}
    parts = [_MAGIC, struct.pack("<4I", VERSION, len(inputs), len(steps), len(outputs))]
    for step in steps:
        counts = KINDS.index(step.kind), len(step.operands), len(step.options), len(step.weights)
        operands = [places[value] for value in step.operands]
        parts.append(struct.pack("<4I", *counts))
        parts.append(struct.pack(f"<{len(operands) + len(step.options)}q", *operands, *step.options))
        parts.extend(_weight_bytes(weight) for weight in step.weights)
        places[step.value] = len(places)
    parts.append(struct.pack(f"<{len(outputs)}q", *(places[value] for value in outputs)))
    return b"".join(parts)


def _weight_bytes(weight: Tensor | None) -> bytes:
    numbers = np.empty(0, "<f4") if weight is None else weight.detach().to(torch.float32).contiguous().numpy()
    head = struct.pack(f"<2I{numbers.ndim}q", numbers.ndim, 0, *numbers.shape)
    data = numbers.astype("<f4", copy=False).tobytes()
    return head + data + bytes(-len(data) % 8)
