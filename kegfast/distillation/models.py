"""The two models of a run: apart from each other, on one device, asked for logits."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kegfast._util import check
from kegfast._util.check import accepts, expected
from kegfast._util.inputs import Inputs, call
from kegfast._util.logits import AsLogits
from kegfast.distillation.ensemble import Ensemble
from kegfast.distillation.hooks import unwrap


class Asked:
    """A model as a function from inputs to logits, (B, C).

    Args:
        name: The argument that the model came as.
        model: Of a tensor, a tuple or a dict of inputs to one tensor: logits, or probabilities, whose
            logarithms are taken then.
    """

    def __init__(self, name: str, model: nn.Module):
        self.name, self.model = name, model
        self._as_logits = AsLogits(name)

    def __call__(self, inputs: Inputs) -> Tensor:
        return self.logits(call(self.model, inputs))

    def on(self, samples: Inputs) -> Tensor:
        """The same for samples of the source, which the model may not take.

        Raises:
            ValueError: It does not.
        """
        with accepts("source", samples, self.name):
            answers = call(self.model, samples)
        return self.logits(answers)

    def logits(self, answers: Any) -> Tensor:
        """What the model answered, as logits.

        Raises:
            TypeError: It is no tensor.
        """
        if not isinstance(answers, Tensor):
            raise TypeError(expected(self.name, "a model that gives logits, one tensor", answers))
        return self._as_logits(answers)

    def aside(self) -> "Asked":
        """The same model past DistributedDataParallel, whose forward pass waits for the other processes."""
        asked = Asked(self.name, unwrap(self.model))
        asked._as_logits = self._as_logits
        return asked


def as_teacher(teacher: nn.Module | Sequence[nn.Module], temperature: float) -> nn.Module:
    """The teacher, an `Ensemble` where there are several."""
    if isinstance(teacher, nn.Module):
        return teacher
    if isinstance(teacher, Sequence) and all(isinstance(model, nn.Module) for model in teacher):
        return Ensemble(teacher, temperature=temperature)
    raise TypeError(expected("teacher", "a module or a list of modules", teacher))


def place(student: nn.Module, teacher: nn.Module, device: torch.device | str | None) -> torch.device:
    """The one device of both models."""
    if not isinstance(student, nn.Module):
        raise TypeError(expected("student", "a module", student))
    if any(module is teacher for module in student.modules()):
        raise ValueError(expected("student", "another model than the teacher", "the same one"))
    if device is not None:
        device = check.device("device", device)
        student.to(device)
        teacher.to(device)
    own, other = _device("student", student), _device("teacher", teacher)
    if own is None:
        raise ValueError(expected("student", "a model with weights", type(student).__name__))
    if other is not None and own != other:
        what = f"on the student's device {own} (move one, or pass device=...)"
        raise ValueError(expected("teacher", what, str(other)))
    return own


def _device(name: str, model: nn.Module) -> torch.device | None:
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    if len(devices) > 1:
        raise ValueError(expected(name, "a model with weights on one device", devices))
    return devices.pop() if devices else None


def set_modes(student: nn.Module, teacher: nn.Module, batchnorm: str) -> None:
    """The student in train mode but for the BatchNorm layers that keep their statistics; the teacher in eval.

    Modules that both models use, which must be frozen ones, are the teacher's.
    """
    if batchnorm not in ("train", "eval"):
        raise ValueError(expected("student_batchnorm", "'train' or 'eval'", batchnorm))
    student.train()
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            frozen = module.affine and not any(p.requires_grad for p in module.parameters())
            module.train(batchnorm == "train" and not frozen)
    teacher.eval()


def check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Raises ValueError where a step of the student would change the teacher: call it after `set_modes`.

    Shared tensors that no step changes, such as frozen parameters, are fine.
    """
    theirs: dict[int, list[Tensor]] = {}
    for tensor in [*teacher.parameters(), *teacher.buffers()]:
        theirs.setdefault(_storage(tensor), []).append(tensor)
    for name, tensor in _changing(student):
        if any(_overlap(tensor, other) for other in theirs.get(_storage(tensor), ())):
            what = "a model that shares nothing with the teacher but frozen parameters"
            raise ValueError(expected("student", what, f"{name}, which is the teacher's too"))


def _changing(student: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a step writes to, by its path."""
    yield from ((name, p) for name, p in student.named_parameters() if p.requires_grad)
    for path, module in student.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            yield from ((f"{path}.{name}", buffer) for name, buffer in module.named_buffers(recurse=False))


def _storage(tensor: Tensor) -> int:
    """Where its memory begins; the tensor itself, where it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, or a subclass that wraps others
        return id(tensor)


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage have bytes in common, by the ranges that they span."""
    if one is other:
        return True
    (start, end), (other_start, other_end) = _span(one), _span(other)
    return start < other_end and other_start < end


def _span(tensor: Tensor) -> tuple[int, int]:
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()
