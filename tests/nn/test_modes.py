"""A TuckerConv2d under torch's modes and transforms: what its three convolutions give, or their failure."""

from collections.abc import Callable

import pytest
import torch
from needs import needs_native
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tucker2_cases import settled, three_convolutions

import kegfast
from kegfast import functional
from kegfast.nn import TuckerConv2d

Module = Callable[[Tensor], Tensor]


def close(got: object, want: object) -> None:
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


# ---- torch.func


def tangent(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, x.numel()).reshape(x.shape)


TRANSFORMS = {
    "functionalize": lambda f, x: functionalize(f)(x),
    "vmap": lambda f, x: vmap(lambda sample: f(sample[None]))(x),
    "grad": lambda f, x: grad(lambda x: f(x).square().sum())(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones_like(f(x))),
    "jvp": lambda f, x: jvp(f, (x,), (tangent(x),)),
    "jacrev": lambda f, x: jacrev(lambda x: f(x).mean((2, 3)))(x[:1]),
    "jacfwd of jacrev": lambda f, x: jacfwd(jacrev(lambda x: f(x).square().mean()))(x[:1, :, :3, :3]),
    "vmap of grad": lambda f, x: vmap(grad(lambda sample: f(sample[None]).square().sum()))(x),
    "functionalize of vmap": lambda f, x: functionalize(vmap(lambda sample: f(sample[None])))(x),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str, frozen: bool) -> None:
    layer, x = settled()
    layer.requires_grad_(not frozen)
    plain = layer.to_sequential()
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            for _ in range(2):
                close(TRANSFORMS[name](layer, x), TRANSFORMS[name](plain, x))
            close(layer(x), plain(x))


def test_stacked_weights() -> None:
    layer, x = settled()
    weights = {name: torch.stack([w, 2 * w]) for name, w in layer.named_parameters()}

    def call(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, weights, (x,))

    with torch.no_grad():
        y = vmap(call)(weights)
        close(y[0], layer(x))
        close(y[1], call({name: w[1] for name, w in weights.items()}))


# ---- forward-mode differentiation


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("frozen", [False, True])
def test_tangents_are_kept(mode, frozen: bool) -> None:
    layer, x = settled()
    layer.requires_grad_(not frozen)
    found = []
    with mode(), forward_ad.dual_level():
        for module in (layer, layer.to_sequential()):
            for _ in range(3):
                y = forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent(x))))
            assert y.tangent is not None
            found.append(tuple(y))
    close(*found)
    with torch.no_grad():
        close(layer(x), three_convolutions(layer, x))


def test_tangents_of_weights_are_kept() -> None:
    layer, x = settled()
    found = []
    with torch.no_grad(), forward_ad.dual_level():
        weights = {n: forward_ad.make_dual(w.detach(), tangent(w)) for n, w in layer.named_parameters()}
        plain = {
            n.replace("first", "0").replace("core", "1").replace("last", "2"): w for n, w in weights.items()
        }
        for module, given in ((layer, weights), (layer.to_sequential(), plain)):
            found.append(tuple(forward_ad.unpack_dual(functional_call(module, given, (x,)))))
    assert found[0][1] is not None
    close(*found)


def test_tangents_of_losses_are_kept() -> None:
    noises, samples = torch.randn(2, 5, 4)
    found = []
    for name in ("auto", "reference"):
        with torch.no_grad(), kegfast.backend(name), forward_ad.dual_level():
            dual = forward_ad.make_dual(samples, tangent(samples))
            losses = functional.diversity_loss(noises, dual), functional.soft_target(dual, noises)
            found.append([tuple(forward_ad.unpack_dual(loss)) for loss in losses])
            assert all(y.tangent is not None for y in map(forward_ad.unpack_dual, losses))
    close(*found)


# ---- modes


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        return 2 * y if func is functional.tucker_conv2d else y


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "kegfast" in str(func) or "conv" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True])
def test_modes_see_every_call(grad: bool) -> None:
    layer, x = settled()
    with torch.set_grad_enabled(grad):
        for _ in range(4):
            with Functions() as functions:
                layer(x)
            assert functions.seen.count("tucker_conv2d") == 1
            with Operators() as operators:
                layer(x)
            assert operators.count > 0
            want = layer(x)
            with Doubling():
                close(layer(x), 2 * want)


@needs_native
def test_a_default_device_changes_nothing() -> None:
    layer, x = settled()
    with torch.no_grad(), torch.device("cpu"):
        close(layer(x), three_convolutions(layer, x))
        assert kegfast.last_kernel() != "unfused"


def test_flops_of_every_call() -> None:
    layer, x = settled()
    totals = []
    for module in (layer, layer, layer.to_sequential()):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(x)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] == totals[2] > 0


@pytest.mark.parametrize("allow", [False, True])
def test_fake_tensors(allow: bool) -> None:
    layer, x = settled()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=allow) as mode:
        fake = mode.from_tensor(x)
        if allow:
            y = layer(fake)
            assert type(y) is type(fake)
            assert y.shape == (2, 20, 9, 8)
        else:
            with pytest.raises(Exception, match="convert all Tensors to FakeTensors"):
                layer(fake)
        built = TuckerConv2d(6, 20, 3, (4, 17), padding=1)
        assert built(fake).shape == (2, 20, 9, 8)
    with torch.no_grad():
        close(layer(x), three_convolutions(layer, x))


@pytest.mark.parametrize("tracing", ["real", "fake"])
@pytest.mark.parametrize("grad", [False, True])
def test_graphs_follow_the_weights(tracing: str, grad: bool) -> None:
    layer, x = settled()
    weights = dict(layer.named_parameters())
    with torch.set_grad_enabled(grad):
        graph = make_fx(lambda w, x: functional_call(layer, w, (x,)), tracing_mode=tracing)(weights, x)
    other = {name: w.detach() * 2 for name, w in weights.items()}
    with torch.no_grad():
        close(graph(other, x + 1), functional_call(layer, other, (x + 1,)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traces_follow_their_inputs() -> None:
    layer, x = settled()
    with torch.no_grad():
        for _ in range(2):
            close(torch.jit.trace(layer, x)(x + 1), three_convolutions(layer, x + 1))
            close(layer(x), three_convolutions(layer, x))


# ---- kinds of tensors


def functional_tensor(x: Tensor) -> Tensor:
    with FunctionalTensorMode():
        return FunctionalTensor.to_functional(x)


class Tagged(Tensor):
    pass


KINDS = {
    "neg view": torch._neg_view,
    "imaginary part": lambda x: torch.complex(x, -x).conj().imag,
    "functional": torch._to_functional_tensor,
    "efficient zeros": lambda x: torch._efficientzerotensor(x.shape),
    "meta": lambda x: x.to("meta"),
    "subclass": lambda x: x.as_subclass(Tagged),
    "parameter": lambda x: nn.Parameter(x),
    "sparse": lambda x: x.to_sparse(),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "complex": lambda x: torch.complex(x, x),
    "integers": lambda x: x.int(),
    "expanded": lambda x: x[:1].expand(2, 6, 9, 8),
    "inference": lambda x: inference_copy(x),
}


def unallocated(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(0)
    return x


@torch.inference_mode()
def inference_copy(x: Tensor) -> Tensor:
    return x.clone()


def outcome(module: Module, x: Tensor) -> Tensor | None:
    try:
        y = module(x)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return None
    y = torch._from_functional_tensor(y) if torch._is_functional_tensor(y) else y
    return y.to_dense() if y.layout is torch._mkldnn else y


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_inputs(kind: str, mode) -> None:
    layer, x = settled()
    given = KINDS[kind](x)
    with mode():
        for _ in range(3):
            got, want = outcome(layer, given), outcome(layer.to_sequential(), given)
            assert (got is None) == (want is None)
            if want is not None:
                assert type(got) is type(want)
                if not want.is_meta:
                    close(got.detach(), want.detach())
    with torch.no_grad():
        close(layer(x), three_convolutions(layer, x))


@pytest.mark.parametrize("name", ["first.weight", "core.weight", "last.weight", "last.bias"])
@pytest.mark.parametrize("kind", ["neg view", "efficient zeros", "subclass", "sparse"])
def test_kinds_of_weights(name: str, kind: str) -> None:
    layer, x = settled()
    module, _, leaf = name.partition(".")
    weight = getattr(getattr(layer, module), leaf)
    setattr(getattr(layer, module), leaf, nn.Parameter(KINDS[kind](weight.detach())))
    with torch.no_grad():
        for _ in range(3):
            got, want = outcome(layer, x), outcome(layer.to_sequential(), x)
            assert (got is None) == (want is None)
            if want is not None:
                close(got, want)


@needs_native  # torch's own convolution reads such memory
@pytest.mark.parametrize("name", ["x", "first.weight", "core.weight", "last.weight", "last.bias"])
@pytest.mark.parametrize("grad", [False, True])
def test_storage_that_shrinks_under_a_settled_layer(name: str, grad: bool) -> None:
    layer, x = settled()
    module, _, leaf = name.partition(".")
    tensor = x if name == "x" else getattr(getattr(layer, module), leaf)
    for size in (0, 4):
        tensor.detach().untyped_storage().resize_(size)
        with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, ValueError)):
            layer(x)


@needs_native
def test_functions_name_what_has_no_memory() -> None:
    layer, x = settled()
    weights = [p.detach() for p in layer.parameters()]
    for i, name in enumerate(("first", "core", "last", "bias")):
        given = [unallocated(w.clone()) if k == i else w for k, w in enumerate(weights)]
        with pytest.raises(ValueError, match=f"{name} must be a tensor whose storage holds its numbers"):
            functional.tucker_conv2d(x, *given, padding=1)
    with pytest.raises(ValueError, match="x must be a tensor whose storage holds its numbers"):
        functional.tucker_conv2d(unallocated(x), *weights, padding=1)


@pytest.fixture
def process_group(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_distributed_tensors(process_group) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    layer, x = settled()
    want = three_convolutions(layer, x)
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(layer.core, mesh=mesh)
    for _ in range(3):
        close(layer(x).detach(), want)
    layer(x).sum().backward()
    layer, x = settled()
    fully_shard(layer, mesh=mesh)
    with torch.no_grad():
        for _ in range(3):
            close(layer(x), want)
    layer, x = settled()
    distribute_module(layer, mesh)
    with torch.no_grad():
        for _ in range(2):
            close(layer(distribute_tensor(x, mesh, [Replicate()])).full_tensor(), want)
