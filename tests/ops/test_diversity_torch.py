"""The diversity loss inside torch: autograd, compile, export, autocast, copies, DDP, and what it refuses."""

import copy
import functools
import pickle

import pytest
import torch
from needs import needs_native

import kegfast
from kegfast.functional import diversity_loss
from kegfast.nn import DiversityLoss
from kegfast.ops import diversity, reference

METRICS = list(diversity.METRICS)
NOISE_METRICS = list(diversity.NOISE_METRICS)


@pytest.fixture(params=["native", "reference"])
def backend(request):
    if request.param == "native" and not kegfast.build_info()["native"]:
        pytest.skip("no compiled part")
    with kegfast.backend(request.param):
        yield request.param


def inputs(batch=6, features=5, width=3, dtype=torch.float64, grad=True):
    torch.manual_seed(0)
    noises, samples = (torch.randn(batch, n, dtype=dtype) for n in (width, features))
    return noises.requires_grad_(grad), samples.requires_grad_(grad)


def authors_form(noises, samples):
    """exp(mean(-noise distance * sample distance)) spelled out pair by pair."""
    total = 0
    for z, x in zip(noises, samples, strict=True):
        for y, v in zip(noises, samples, strict=True):
            total = total - (z - y).square().mean() * (x - v).abs().mean()
    return (total / len(noises) ** 2).exp()


def test_is_the_authors_loss(backend):
    noises, samples = inputs()
    torch.testing.assert_close(diversity_loss(noises, samples), authors_form(noises, samples))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("noise_metric", NOISE_METRICS)
def test_gradcheck(backend, metric, noise_metric):
    options = {"metric": metric, "noise_metric": noise_metric}
    for extra in ({}, {"log": True}, {"reduction": "sum", "log": True}):
        assert torch.autograd.gradcheck(functools.partial(diversity_loss, **options, **extra), inputs())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_labels_restrict_the_pairs(backend, metric, reduction):
    noises, samples = inputs(7)
    labels = torch.tensor([2, 0, 2, 1, 0, 2, 2])
    same = labels[:, None] == labels
    weights = reference.pair_distance(noises, "sqeuclidean")
    products = weights * reference.pair_distance(samples, metric) * same
    exact = -products.sum() / (same.sum() if reduction == "mean" else 1)
    got = diversity_loss(noises, samples, metric=metric, reduction=reduction, labels=labels, log=True)
    torch.testing.assert_close(got, exact)
    exact_gradients = torch.autograd.grad(exact, (noises, samples))
    torch.testing.assert_close(torch.autograd.grad(got, (noises, samples)), exact_gradients)


def test_labels_in_native_single_precision():
    noises, samples = inputs(300, 40, 10, torch.float32)
    labels = torch.arange(300) % 2
    halves = [diversity_loss(noises[i::2], samples[i::2], log=True) for i in range(2)]
    got = diversity_loss(noises, samples, labels=labels, log=True)
    torch.testing.assert_close(got, sum(halves) / 2)


def test_sum_and_log(backend):
    noises, samples = inputs(20)
    mean = diversity_loss(noises, samples, log=True)
    torch.testing.assert_close(diversity_loss(noises, samples), mean.exp())
    total = diversity_loss(noises, samples, reduction="sum", log=True)
    torch.testing.assert_close(total, mean * 400)


def test_alias_and_flattening(backend):
    noises, samples = inputs(8, 12, 6)
    flat = diversity_loss(noises, samples, metric="sqeuclidean")
    shaped = diversity_loss(noises.view(8, 2, 3), samples.view(8, 3, 2, 2), metric="l2")
    assert torch.equal(flat, shaped)


def test_gradients_reach_only_what_asks(backend):
    noises, samples = inputs(grad=False)
    assert not diversity_loss(noises, samples).requires_grad
    samples.requires_grad_()
    diversity_loss(noises, samples).backward()
    assert noises.grad is None
    assert samples.grad is not None
    noises, samples = inputs()
    diversity_loss(noises, samples.detach()).backward()
    assert noises.grad is not None


def test_second_pass_through_a_retained_graph():
    noises, samples = inputs(100, 20, 4, torch.float32)
    loss = diversity_loss(noises, samples)
    first = torch.autograd.grad(loss, (noises, samples), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss * 3, (noises, samples))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    torch.testing.assert_close(second, tuple(3 * g for g in kept))


@needs_native
@pytest.mark.parametrize("direct", [False, True])
def test_a_gradient_of_the_gradient_is_refused(direct):
    noises, samples = inputs()
    if direct:
        loss = torch.ops.kegfast.diversity_forward(noises, samples, 0, 0, True, True)[0]
    else:
        loss = diversity_loss(noises, samples)
    (gradient,) = torch.autograd.grad(loss, samples, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        (samples.sum() + gradient.sum()).backward()


def test_inputs_are_left_alone(backend):
    noises, samples = inputs(90, 20, 4, torch.float32)
    before = noises.detach().clone(), samples.detach().clone()
    diversity_loss(noises, samples).backward()
    assert torch.equal(noises, before[0])
    assert torch.equal(samples, before[1])


@needs_native
@pytest.mark.parametrize("metric", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(metric, dtype):
    noises, samples = inputs(9, 7, 3, dtype)
    torch.library.opcheck(
        torch.ops.kegfast.diversity_forward, (noises, samples, metric, metric % 2, True, True)
    )


@needs_native
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_loss_operator_is_the_exponent_operator_finished(log, dtype):
    noises, samples = inputs(9, 7, 3, dtype, grad=False)
    loss, *gradients = torch.ops.kegfast.diversity_loss(noises, samples, 0, 1, 2.0, log, True, True)
    exponent, *plain = torch.ops.kegfast.diversity_forward(noises, samples, 0, 1, True, True)
    torch.testing.assert_close(loss, diversity.finish(exponent, dtype, 2.0, log))
    torch.testing.assert_close(gradients, [2 * g for g in plain])
    arguments = (noises, samples, 0, 1, 2.0, log, True, True)
    torch.library.opcheck(
        torch.ops.kegfast.diversity_loss, arguments, test_utils=("test_schema", "test_faketensor")
    )


@needs_native
def test_compile_without_a_graph_break():
    compiled = torch.compile(
        lambda z, x: diversity_loss(z, x.tanh(), metric="l1"), fullgraph=True, backend="aot_eager"
    )
    noises, samples = inputs(90, 20, 4, torch.float32)
    exact = diversity_loss(noises, samples.tanh())
    exact_gradients = torch.autograd.grad(exact, (noises, samples))
    loss = compiled(noises, samples)
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(torch.autograd.grad(loss, (noises, samples)), exact_gradients)


@needs_native
def test_export():
    noises, samples = inputs(8, 12, 3, torch.float32, grad=False)
    program = torch.export.export(DiversityLoss(), (noises, samples))
    assert torch.equal(program.module()(noises, samples), DiversityLoss()(noises, samples))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_single_precision(backend, dtype):
    noises, samples = inputs(64, 300, 10, torch.float32)
    weight = torch.randn(300, 300) / 17
    with torch.autocast("cpu", dtype):
        layer = samples @ weight
        loss = diversity_loss(noises, layer)
    assert layer.dtype is dtype
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, diversity_loss(noises, layer.float()))
    loss.backward()
    assert samples.grad.abs().max() > 0


@needs_native
def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    noises, samples = inputs(8, 12, 3, torch.float32, grad=False)
    with FlopCounterMode(display=False) as counter:
        torch.ops.kegfast.diversity_forward(noises, samples, 0, 0, False, True)
    assert counter.get_total_flops() == 4 * 8 * 12 * 5


def test_module_copies():
    module = DiversityLoss("cosine", log=True)
    noises, samples = inputs()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(noises, samples), module(noises, samples))
    assert "cosine" in repr(module)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"noises": [1.0]}, TypeError, "noises must be a floating-point tensor"),
        ({"samples": torch.ones(4, 5, dtype=torch.int64)}, TypeError, "samples must be a floating"),
        ({"noises": torch.ones(4)}, ValueError, r"noises must be of shape \(batch, ...\)"),
        ({"samples": torch.ones(5, 5)}, ValueError, "samples must be a batch of 4"),
        ({"samples": torch.ones(4, 0)}, ValueError, "samples must be"),
        ({"noises": torch.ones(0, 3), "samples": torch.ones(0, 5)}, ValueError, "noises must be"),
        ({"samples": torch.ones(4, 5, device="meta")}, ValueError, "on the noises' device"),
        ({"metric": "l3"}, ValueError, "metric must be one of 'l1'"),
        ({"noise_metric": "cosine"}, ValueError, "noise_metric must be one of"),
        ({"reduction": "none"}, ValueError, "reduction must be one of"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels must be .* of shape \(4,\)"),
        ({"labels": torch.zeros(4, dtype=int, device="meta")}, ValueError, "labels must be .* on cpu"),
        ({"labels": torch.full((4,), float("nan"))}, TypeError, "labels must be integers"),
        ({"samples": torch.ones(4, 5).to_sparse()}, TypeError, "samples must be a floating"),
        ({"samples": torch.ones(4, 5, dtype=torch.float8_e4m3fn)}, TypeError, "samples must be a floating"),
        ({"metric": ["l1"]}, ValueError, "metric must be one of"),
        ({"log": "yes"}, TypeError, "log must be True or False"),
    ],
)
def test_bad_arguments(change, error, words):
    arguments = {"noises": torch.ones(4, 3), "samples": torch.ones(4, 5), **change}
    with pytest.raises(error, match=words):
        diversity_loss(arguments.pop("noises"), arguments.pop("samples"), **arguments)


@pytest.mark.parametrize("change", [{"metric": "l3"}, {"noise_metric": "l1"}, {"reduction": 3}, {"log": 1}])
def test_the_module_refuses_at_once_what_the_loss_would(change):
    with pytest.raises((ValueError, TypeError), match=f"^{next(iter(change))} must be"):
        DiversityLoss(**change)


@needs_native
@pytest.mark.parametrize(
    "arguments",
    [
        (torch.ones(4), torch.ones(4, 5), 0, 0),
        (torch.ones(4, 3), torch.ones(5, 5), 0, 0),
        (torch.ones(4, 3), torch.ones(4, 5), 9, 0),
        (torch.ones(4, 3), torch.ones(4, 5), 0, 2),
        (torch.ones(4, 3), torch.ones(4, 5).int(), 0, 0),
        (torch.ones(0, 3), torch.ones(0, 5), 0, 0),
    ],
)
def test_the_bare_operator_refuses_bad_arguments(arguments):
    with pytest.raises(RuntimeError, match="kegfast"):
        torch.ops.kegfast.diversity_forward(*arguments, False, True)


def test_peak_memory_is_one_gradient():
    psutil = pytest.importorskip("psutil")
    noises, samples = inputs(64, 200_000, 3, torch.float32)  # 51 MB
    process = psutil.Process()
    before = process.memory_info().rss
    diversity_loss(noises, samples).backward()
    assert process.memory_info().rss - before < 1.5 * samples.numel() * 4
    assert samples.grad.shape == samples.shape
