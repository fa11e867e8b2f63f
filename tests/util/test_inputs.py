"""Inputs of models: tensors, tuples and dicts are called, moved, cut and joined alike."""

import pytest
import torch
from torch import Tensor

from kegfast._util import inputs


def weighted(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    return a.sum(1) + scale * b


A, B = torch.randn(7, 3), torch.randn(7)
FORMS = {
    "tensor": (A, lambda a: a.sum(1), A.sum(1)),
    "tuple": ((A, B), weighted, A.sum(1) + B),
    "dict": ({"b": B, "a": A}, weighted, A.sum(1) + B),
    "flags": ({"a": A, "b": B, "scale": 2.0}, weighted, A.sum(1) + 2 * B),
    "scalars": ((A, B, torch.tensor(3.0)), weighted, A.sum(1) + 3 * B),
}


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_the_inputs_give_the_parts_of_the_answer(form):
    whole, model, answer = FORMS[form]
    assert inputs.count(whole) == 7
    parts = inputs.split(whole, 3)
    assert [inputs.count(part) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([inputs.call(model, part) for part in parts]), answer)
    assert torch.equal(inputs.call(model, inputs.concat(parts)), answer)
    index = torch.tensor([5, 0, 0])
    assert torch.equal(inputs.call(model, inputs.take(whole, index)), answer[index])
    doubled = inputs.each(Tensor.double, whole)
    assert {x.dtype for x in inputs.tensors_in(doubled)} == {torch.float64}


@pytest.mark.parametrize(
    ("batch", "found", "labels"),
    [
        (A, A, None),
        ([A], A, None),
        ([A, B], A, B),
        ([[A, B], B], (A, B), B),
        ({"x": A}, {"x": A}, None),
        ({"x": A, "labels": B}, {"x": A}, B),
        ([{"x": A}, B, 5], {"x": A}, B),
    ],
)
def test_batches_are_inputs_with_or_without_labels(batch, found, labels):
    got = inputs.unpack("source", batch)
    assert str(got) == str((found, labels))
    assert type(got[0]) is type(found)


@pytest.mark.parametrize("wrong", [None, 5, [], "text", {}, {"labels": B}, {1: A}, [None], ([1.0, 2.0], B)])
def test_other_batches_are_refused(wrong):
    with pytest.raises(TypeError, match=r"^source must be"):
        inputs.unpack("source", wrong)


def test_different_numbers_of_samples_are_refused():
    with pytest.raises(ValueError, match=r"^example_input must be tensors of as many samples each, got"):
        inputs.as_inputs("example_input", (A, B[:3]))
    with pytest.raises(ValueError, match=r"^inputs must be alike in every batch"):
        inputs.concat([(A, B), (A,)])
