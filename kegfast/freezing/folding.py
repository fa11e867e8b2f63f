"""What a step's last store can take over from the steps behind it."""

from collections.abc import Collection, Hashable, Mapping
from typing import TypeGuard

import torch

from kegfast.freezing.network import ADDEND, RELU, Step
from kegfast.freezing.values import MOST_TAPS

FOLDS_SCALE = {"convolution", "tucker2", "linear"}


class Folding:
    """A list of steps that grows shorter.

    Args:
        steps: in an order in which each uses values made before it.
        outputs: values that must remain.
        shapes: of values, for the example input.
    """

    def __init__(
        self,
        steps: list[Step],
        outputs: Collection[Hashable],
        shapes: Mapping[Hashable, tuple[int, ...]],
    ):
        self.steps, self.outputs, self.shapes = steps, outputs, shapes

    def folded(self) -> list[Step]:
        """The steps that remain."""
        self._flattened_linears()
        self._scales()
        self._sums()
        self._rectifiers()
        return self._used()

    def _made(self) -> dict[Hashable, Step]:
        return {step.value: step for step in self.steps}

    def _alone(self, value: Hashable) -> bool:
        """Whether one step uses a value, and once."""
        users = sum(step.operands.count(value) for step in self.steps)
        return users == 1 and value not in self.outputs

    def _open(self, layer: Step | None, kinds: Collection[str]) -> TypeGuard[Step]:
        """Whether it is of such a kind, may do more behind what it does, and one step uses its value."""
        if layer is None or layer.kind not in kinds or not self._alone(layer.value):
            return False
        return not layer.rectified and len(layer.operands) == 1

    def _flattened_linears(self) -> None:
        """A Linear of a flattened image is a convolution whose kernel is the image."""
        made = self._made()
        for step in self.steps:
            flat = made.get(step.operands[0])
            if step.kind != "linear" or flat is None or flat.kind != "flatten":
                continue
            _, channels, height, width = self.shapes[flat.operands[0]]
            if height * width > MOST_TAPS:
                continue
            weight, bias = step.weights
            if weight is None:
                continue
            step.kind, step.operands[0] = "convolution", flat.operands[0]
            step.options = [1, 1, 0, 0, 1, 1, 1, step.options[0], 1]
            step.weights = [weight.reshape(-1, channels, height, width), bias]
        self.steps = self._used()

    def _scales(self) -> None:
        """Scales and shifts by channel behind a layer go into its weights."""
        for scale in [step for step in self.steps if step.kind == "affine"]:
            layer = self._made().get(scale.operands[0])
            if not self._open(layer, FOLDS_SCALE):
                continue
            factor, shift = (w.double() for w in scale.weights if w is not None)
            *rest, last, bias = layer.weights
            if last is None:
                continue
            scaled = last.double() * factor.reshape(-1, *[1] * (last.dim() - 1))
            moved = shift if bias is None else bias.double() * factor + shift
            layer.weights = [*rest, scaled.to(torch.float32), moved.to(torch.float32)]
            layer.options = [*layer.options]
            if scale.rectified:
                layer.options[RELU[layer.kind]] = 1
            layer.value = scale.value
            self.steps.remove(scale)

    def _sums(self) -> None:
        """The later of two layers that are added adds the other's output itself."""
        for total in [step for step in self.steps if step.kind == "add"]:
            order = {step.value: at for at, step in enumerate(self.steps)}
            for value in sorted(set(total.operands), key=lambda v: order.get(v, -1), reverse=True):
                layer = self._made().get(value)
                if not self._open(layer, ADDEND):
                    continue
                other = total.operands[1 - total.operands.index(value)]
                self.steps.remove(layer)
                at = self.steps.index(total)
                options = [*layer.options]
                options[RELU[layer.kind]] = total.options[0]
                self.steps[at] = Step(
                    layer.kind, [layer.operands[0], other], options, layer.weights, total.value, layer.name
                )
                break

    def _rectifiers(self) -> None:
        for relu in [step for step in self.steps if step.kind == "activation" and step.options == [0]]:
            layer = self._made().get(relu.operands[0])
            if layer is None or layer.kind not in RELU or not self._alone(layer.value):
                continue
            layer.options = [*layer.options]
            layer.options[RELU[layer.kind]] = 1
            layer.value = relu.value
            self.steps.remove(relu)

    def _used(self) -> list[Step]:
        needed, used = set(self.outputs), []
        for step in reversed(self.steps):
            if step.value in needed:
                used.append(step)
                needed.update(step.operands)
        return used[::-1]
