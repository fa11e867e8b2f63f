"""The fused soft-target loss against float64, on every instruction set."""

import math

import pytest
import torch
from needs import needs_native

import kegfast
from kegfast import functional
from kegfast.ops import reference

ISAS = kegfast.build_info().get("isa_compiled", [])


def logits(batch: int, classes: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch * 1000 + classes)
    student, teacher = scale * torch.randn(2, batch, classes, generator=generator)
    return student.requires_grad_(), teacher


def compare(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> None:
    loss = functional.soft_target(student, teacher, temperature)
    (gradient,) = torch.autograd.grad(loss, student)
    wide = student.detach().double().requires_grad_()
    exact = reference.soft_target(wide, teacher.double(), temperature)
    (exact_gradient,) = torch.autograd.grad(exact, wide)
    assert loss.dtype == gradient.dtype == student.dtype
    assert loss.shape == ()
    # Divergences near zero are differences of sums of size one: the error is relative to those.
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5, abs=3e-7 * temperature**2)
    # So are its gradient's entries, differences of probabilities.
    largest = (wide / temperature).softmax(1).max().item() * temperature / len(student)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=3e-7 * largest)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("classes", [1, 2, 3, 10, 15, 16, 17, 33, 100, 1000, 1024, 1025, 5003])
def test_values_and_gradients(isa, classes):
    if ISAS.index(isa) > ISAS.index(kegfast.build_info()["isa_detected"]):
        pytest.skip(f"this CPU has no {isa}")
    with kegfast.cpu_isa(isa):
        for temperature in (0.5, 4.0):
            compare(*logits(7, classes), temperature)


@needs_native
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_scales(scale):
    compare(*logits(9, 77, scale), 2.0)


@needs_native
def test_layouts():
    student, teacher = logits(6, 40)
    compare(student[:, 3:29], teacher[:, 3:29], 4.0)  # rows apart
    compare(student[::2], teacher[1::2], 4.0)
    compare(student.T.contiguous().T, teacher, 4.0)  # columns


@needs_native
def test_more_rows_than_one_thread_takes_give_the_same():
    student, teacher = logits(600, 1000)
    compare(student, teacher, 4.0)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(torch.autograd.grad(functional.soft_target(student, teacher), student)[0])
    torch.set_num_threads(before)
    assert torch.equal(*results)


@needs_native
def test_equal_models_have_no_divergence():
    student, _ = logits(5, 300)
    loss = functional.soft_target(student, student.detach())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-9


@needs_native
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("column", [0, 20])
def test_what_is_not_finite_is_not_hidden(value, which, column):
    pair = [x.detach().clone() for x in logits(4, 21)]
    pair[which][2, column] = value
    student = pair[0].requires_grad_()
    loss = functional.soft_target(student, pair[1])
    loss.backward()
    assert not loss.isfinite()
    assert not student.grad[2].isfinite().any()
    assert student.grad[[0, 1, 3]].isfinite().all()


@needs_native
def test_a_class_that_the_student_excludes_costs_infinitely_much():
    student, teacher = (x.detach().clone() for x in logits(3, 8))
    student[1, 4] = -math.inf
    assert functional.soft_target(student, teacher).item() == math.inf


@needs_native
def test_opcheck():
    for wanted in (True, False):
        arguments = (*logits(4, 19), 4.0, wanted)
        torch.library.opcheck(torch.ops.kegfast.soft_target_forward.default, arguments)


@needs_native
def test_second_derivatives_are_those_of_the_definition():
    student, teacher = logits(3, 6)
    direction = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))

    def curvature(loss):
        (gradient,) = torch.autograd.grad(loss(student, teacher, 4.0), student, create_graph=True)
        return torch.autograd.grad((gradient * direction).sum(), student)[0]

    torch.testing.assert_close(curvature(functional.soft_target), curvature(reference.soft_target))


@needs_native
def test_compiles_into_one_graph():
    student, teacher = logits(8, 30)
    compiled = torch.compile(functional.soft_target, fullgraph=True, backend="aot_eager")
    expected = functional.soft_target(student, teacher)
    value = compiled(student, teacher)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (value, expected)))


@needs_native
def test_nothing_is_computed_for_a_gradient_that_nobody_wants():
    student, teacher = logits(4, 9)
    loss, gradient = torch.ops.kegfast.soft_target_forward(student.detach(), teacher, 4.0, False)
    assert gradient.numel() == 0
    torch.testing.assert_close(loss, functional.soft_target(student, teacher).detach())
    with torch.no_grad():
        assert not functional.soft_target(student, teacher).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_take_the_definition(dtype):
    student, teacher = (x.detach().to(dtype) for x in logits(4, 9))
    loss = functional.soft_target(student, teacher)
    assert torch.equal(loss, reference.soft_target(student, teacher, 4.0))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("scale", "temperature"),
    [(3.0, 0.1), (1000.0, 4.0), (3.0, 1000.0), (3.0, 300.0), (30.0, 1e4), (1e-3, 1.0)],
)
def test_half_types_at_extreme_temperatures_and_logits(dtype, scale, temperature, backend):
    student, teacher = (x.detach().to(dtype) for x in logits(4, 9, scale))
    wide = student.double().requires_grad_()
    exact = reference.soft_target(wide, teacher.double(), temperature)
    (slope,) = torch.autograd.grad(exact, wide)
    assert exact < torch.finfo(dtype).max  # finite in the dtype too
    with kegfast.backend(backend):
        loss = functional.soft_target(student.requires_grad_(), teacher, temperature)
        (gradient,) = torch.autograd.grad(loss, student)
    assert loss.dtype == gradient.dtype == dtype
    torch.testing.assert_close(
        loss.detach(), exact.detach().to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7
    )
    torch.testing.assert_close(gradient, slope.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_the_reference_backend_takes_the_definition():
    student, teacher = logits(4, 9)
    with kegfast.backend("reference"):
        loss = functional.soft_target(student, teacher)
    assert torch.equal(loss, reference.soft_target(student, teacher, 4.0))
    gradient = reference.soft_target_gradient(student.double(), teacher.double(), 4.0)
    wide = student.detach().double().requires_grad_()
    reference.soft_target(wide, teacher.double(), 4.0).backward()
    torch.testing.assert_close(gradient, wide.grad)


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda s, t: functional.soft_target(s[0], t[0]), ValueError, "student"),
        (lambda s, t: functional.soft_target(s[:0], t[:0]), ValueError, "student"),
        (lambda s, t: functional.soft_target(s, t[:, 1:]), ValueError, "teacher"),
        (lambda s, t: functional.soft_target(s, t.to("meta")), ValueError, "teacher"),
        (lambda s, t: functional.soft_target(s, t.double()), TypeError, "teacher"),
        (lambda s, t: functional.soft_target(s.tolist(), t), TypeError, "student"),
        (lambda s, t: functional.soft_target(s, None), TypeError, "teacher"),
        (lambda s, t: functional.soft_target(s, t, "4"), TypeError, "temperature"),
        (lambda s, t: functional.soft_target(s, t, 0.0), ValueError, "temperature"),
        (lambda s, t: functional.soft_target(s, t, math.inf), ValueError, "temperature"),
    ],
)
def test_bad_arguments_are_named(call, error, argument):
    with pytest.raises(error, match=f"^{argument} must be"):
        call(*logits(4, 9))


@needs_native
def test_the_operator_checks_for_itself():
    student, teacher = logits(4, 9)
    for bad in (
        (student, teacher[1:]),
        (student, teacher[:, 1:]),
        (student.double(), teacher),
        (student[0], teacher),
    ):
        with pytest.raises(RuntimeError, match="must be"):
            torch.ops.kegfast.soft_target_forward(*bad, 4.0, True)
