"""The tucker2 operators inside torch: opcheck, compile, export, autocast, FLOPs, other processes."""

from pathlib import Path

import pytest
import torch
import two_processes
from needs import needs_native
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from kegfast.functional import tucker_conv2d
from kegfast.nn import TuckerConv2d

pytestmark = needs_native


def arguments(channels_last: bool = False, dtype: torch.dtype = torch.float32, grad: bool = False):
    rng = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 7, 6), (3, 4, 1, 1), (5, 3, 3, 2), (6, 5, 1, 1), (6,)]
    tensors = [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]
    if channels_last:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    return [t.requires_grad_(grad) for t in tensors]


GEOMETRY = (2, 1, 1, 0, 1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("geometry", [GEOMETRY, (1, 1, 1, 0, 1, 1)])
def test_opcheck(geometry, channels_last: bool, dtype: torch.dtype) -> None:
    op = torch.ops.kegfast
    plain = arguments(channels_last, dtype)
    torch.library.opcheck(op.tucker2.default, (*plain, None, *geometry, True))
    for keep in (False, True):
        torch.library.opcheck(op.tucker2_forward.default, (*plain, *geometry, False, keep))
    leaves = arguments(channels_last, dtype, grad=True)
    torch.library.opcheck(
        op.tucker2_forward.default,
        (*leaves, *geometry, True, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck_of_the_gradient(channels_last: bool) -> None:
    x, first, core, last, _ = arguments(channels_last)
    for geometry in ((1, 1, 1, 0, 1, 1), (2, 1, 1, 1, 1, 1)):
        y, t1, t2 = torch.ops.kegfast.tucker2_forward(x, first, core, last, None, *geometry, True, True)
        for needs in ((True,) * 5, (True, False, False, False, False), (False, True, False, True, True)):
            for gradient in (torch.ones_like(y), torch.ones(y.shape)):
                torch.library.opcheck(
                    torch.ops.kegfast.tucker2_gradients.default,
                    (gradient, y, x, t1, t2, first, core, last, *geometry, *needs),
                )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(backend: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(TuckerConv2d(4, 6, 3, (3, 5), padding=1), nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(2, 4, 7, 6)
    with torch._inductor.config.patch(
        force_disable_caches=True
    ):  # graphs of another version of the operators
        y = compiled(x)
    y.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    want = model(x)
    want.square().sum().backward()
    torch.testing.assert_close(y, want)
    for got, p in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), want.detach())


def test_exports() -> None:
    model = TuckerConv2d(4, 6, 3, (3, 5), padding=1).eval()
    x = torch.randn(2, 4, 7, 6)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    names = {str(node.target) for node in program.graph.nodes}
    assert any("kegfast.tucker2" in name for name in names)
    for batch in (2, 5):
        x = torch.randn(batch, 4, 7, 6)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_and_returns_its_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = TuckerConv2d(4, 6, 3, (3, 5), padding=1)
    x = torch.randn(2, 4, 7, 6)
    want = layer(x)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        with torch.no_grad():
            inference = layer(x)
    assert y.dtype == inference.dtype == dtype
    torch.testing.assert_close(y.float(), want, atol=3e-2, rtol=3e-2)
    assert torch.equal(y, inference)
    y.float().sum().backward()
    assert layer.core.weight.grad.dtype == torch.float32


def test_flops_are_counted() -> None:
    layer = TuckerConv2d(8, 16, (3, 5), (4, 2), stride=2, padding=1)
    x = torch.randn(3, 8, 11, 12)
    counts = []
    for model in (layer, layer.to_sequential()):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    # Stride 1 trains inside the operator: one forward, its gradient and the weights'.
    layer = TuckerConv2d(8, 16, 3, (4, 2), padding=1)
    counts = []
    for model in (layer, layer.to_sequential()):
        with FlopCounterMode(display=False) as counter:
            model(x.clone().requires_grad_()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def _train(rank: int, folder: Path) -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(TuckerConv2d(4, 6, 3, (3, 5), padding=1))
    x = torch.randn(4, 4, 7, 6)[2 * rank : 2 * rank + 2]
    model(x).square().mean().backward()
    torch.save([p.grad for p in model.parameters()], folder / f"{rank}.pt")


def test_data_parallel_on_two_processes(tmp_path: Path) -> None:
    two_processes.run(_train, tmp_path, tmp_path)
    torch.manual_seed(0)
    model = TuckerConv2d(4, 6, 3, (3, 5), padding=1)
    model(torch.randn(4, 4, 7, 6)).square().mean().backward()
    for rank in range(2):
        for got, p in zip(torch.load(tmp_path / f"{rank}.pt"), model.parameters(), strict=True):
            torch.testing.assert_close(got, p.grad, atol=1e-6, rtol=1e-5)


def test_second_derivatives_are_refused_not_wrong() -> None:
    leaves = arguments(grad=True)
    y = tucker_conv2d(*leaves, stride=1, padding=(1, 0))
    (grad,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.square().sum(), leaves[0])
