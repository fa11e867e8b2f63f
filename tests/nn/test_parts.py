"""Whatever hangs at a TuckerConv2d's first, core and last is called as the module that it is."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.nn.utils import parametrizations, prune
from tucker2_cases import settled, three_convolutions

from kegfast.nn import TuckerConv2d

PARTS = "first", "core", "last"
MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


def one_by_one(layer: TuckerConv2d, x: Tensor) -> Tensor:
    return layer.last(layer.core(layer.first(x)))


def agrees(layer: TuckerConv2d, x: Tensor) -> None:
    for mode in MODES:
        with mode():
            for _ in range(3):
                torch.testing.assert_close(layer(x), one_by_one(layer, x), atol=1e-5, rtol=1e-5)


@pytest.fixture(params=PARTS)
def part(request) -> str:
    return request.param


# ---- reparametrizations


def weight_norm(module: nn.Conv2d) -> nn.Parameter:
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(module)
    return module.weight_g


def spectral_norm(module: nn.Conv2d) -> nn.Parameter:
    torch.nn.utils.spectral_norm(module)
    return module.weight_orig


def pruning(module: nn.Conv2d) -> nn.Parameter:
    prune.l1_unstructured(module, "weight", 0.5)
    return module.weight_orig


def parametrized(module: nn.Conv2d) -> nn.Parameter:
    parametrizations.weight_norm(module)
    return module.parametrizations.weight.original0


@pytest.mark.parametrize("reparametrize", [weight_norm, spectral_norm, pruning, parametrized])
def test_reparametrized_weights_are_followed(part: str, reparametrize) -> None:
    layer, x = settled()
    source = reparametrize(getattr(layer, part))
    for change in (lambda t: t.mul_(3), lambda t: t.data.add_(0.5)):
        with torch.no_grad():
            before = layer(x)
            change(source)
            # In evaluation mode spectral_norm only divides; the others see another weight.
            y = layer(x)
        torch.testing.assert_close(y, one_by_one(layer, x).detach(), atol=1e-5, rtol=1e-5)
        assert reparametrize is spectral_norm or not torch.allclose(y, before)
    state = {name: t + 0.25 for name, t in layer.state_dict().items()}
    layer.load_state_dict(state)
    agrees(layer, x)


def test_a_pruned_layer_trains_on() -> None:
    layer, x = settled()
    prune.random_unstructured(layer.core, "weight", 0.5)
    steps = torch.optim.SGD(layer.parameters(), 0.01)
    twin = nn.Sequential(layer.first, layer.core, layer.last)
    for _ in range(3):
        steps.zero_grad()
        layer(x).square().sum().backward()
        found = [p.grad.clone() for p in layer.parameters()]
        steps.zero_grad()
        twin(x).square().sum().backward()
        for got, p in zip(found, layer.parameters(), strict=True):
            torch.testing.assert_close(got, p.grad)
        steps.step()
    assert (layer.core.weight == 0).float().mean() > 0.4


# ---- hooks


HOOKS = [
    lambda m, f: m.register_forward_hook(lambda *_: f()),
    lambda m, f: m.register_forward_pre_hook(lambda *_: f()),
    lambda m, f: m.register_full_backward_hook(lambda *_: f()),
    lambda m, f: m.register_full_backward_pre_hook(lambda *_: f()),
]


@pytest.mark.parametrize("register", HOOKS, ids=["forward", "forward pre", "backward", "backward pre"])
def test_hooks_of_parts_run(part: str, register) -> None:
    layer, x = settled()
    calls: list[int] = []
    handle = register(getattr(layer, part), lambda: calls.append(1))
    for _ in range(3):
        layer(x).sum().backward()
    assert len(calls) == 3
    handle.remove()
    layer(x).sum().backward()
    assert len(calls) == 3
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        calls.clear()
        handle = register(getattr(layer, part), lambda: calls.append(1))
        layer(x)
        assert len(calls) == (register in HOOKS[:2])


def test_hooks_that_replace_outputs_are_heeded(part: str) -> None:
    layer, x = settled()
    getattr(layer, part).register_forward_hook(lambda module, inputs, y: 2 * y)
    agrees(layer, x)


@pytest.mark.parametrize(
    "register",
    [
        modules.register_module_forward_hook,
        modules.register_module_forward_pre_hook,
        modules.register_module_full_backward_hook,
        modules.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_of_all_modules_run(register) -> None:
    layer, x = settled()
    seen: list[nn.Module] = []
    handle = register(lambda module, *_: seen.append(module))
    try:
        with torch.no_grad():
            for _ in range(2):
                layer(x)
        layer(x.clone().requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert {id(layer.first), id(layer.core), id(layer.last)} <= set(map(id, seen))


# ---- modules put in by hand


def with_bias(layer: TuckerConv2d) -> None:
    layer.core = nn.Conv2d(4, 17, 3, padding=1)


def bias_parameter(layer: TuckerConv2d) -> None:
    layer.first.bias = nn.Parameter(torch.randn(4))


def reflecting(layer: TuckerConv2d) -> None:
    layer.core = nn.Conv2d(4, 17, 3, padding=1, padding_mode="reflect", bias=False)


def reflecting_later(layer: TuckerConv2d) -> None:
    layer.core.padding_mode = "circular"
    layer.core._reversed_padding_repeated_twice = (1, 1, 1, 1)


def strided_last(layer: TuckerConv2d) -> None:
    layer.last = nn.Conv2d(17, 20, 1, stride=2)


def strided_later(layer: TuckerConv2d) -> None:
    layer.last.stride = (2, 2)


def wide_first(layer: TuckerConv2d) -> None:
    layer.first = nn.Conv2d(6, 4, 3, padding=1, bias=False)


def wide_weight(layer: TuckerConv2d) -> None:
    layer.first.weight = nn.Parameter(torch.randn(4, 6, 3, 3))


def grouped(layer: TuckerConv2d) -> None:
    layer.first = nn.Conv2d(6, 4, 1, groups=2, bias=False)


def same_padding(layer: TuckerConv2d) -> None:
    layer.core.padding, layer.core.dilation = "same", (2, 2)


def list_of_strides(layer: TuckerConv2d) -> None:
    layer.core.stride = [2, 1]


def subclass(layer: TuckerConv2d) -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    layer.first.__class__ = Scaled


def own_forward(layer: TuckerConv2d) -> None:
    plain = layer.core.forward
    layer.core.forward = lambda x: plain(x) + 1


def own_convolution(layer: TuckerConv2d) -> None:
    layer.core._conv_forward = lambda x, weight, bias: F.conv2d(x, weight.abs(), bias, padding=1)


def weight_beside_parameters(layer: TuckerConv2d) -> None:
    """As tools do that compute a weight: a tensor in the parameter's place."""
    weight = layer.last.weight.detach() * 2
    del layer.last.weight
    layer.last.weight = weight


def in_a_sequence(layer: TuckerConv2d) -> None:
    layer.core = nn.Sequential(layer.core, nn.BatchNorm2d(17).eval(), nn.Tanh())


def no_part(layer: TuckerConv2d) -> None:
    layer.first = nn.Identity()
    layer.core = nn.Conv2d(6, 17, 3, padding=1)


CHANGES = [
    with_bias, bias_parameter, reflecting, reflecting_later, strided_last, strided_later, wide_first,
    wide_weight, grouped, same_padding, list_of_strides, subclass, own_forward, own_convolution,
    weight_beside_parameters, in_a_sequence, no_part,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_other_modules_are_called(change) -> None:
    layer, x = settled()
    before = three_convolutions(layer, x)
    change(layer)
    with torch.no_grad():
        want = one_by_one(layer, x)
    assert want.shape != before.shape or not torch.allclose(want, before)
    agrees(layer, x)
    layer.activation = "relu"
    torch.testing.assert_close(layer(x).detach(), want.relu(), atol=1e-5, rtol=1e-5)
    addend = torch.randn_like(want)
    torch.testing.assert_close(layer(x, addend).detach(), (want + addend).relu(), atol=1e-5, rtol=1e-5)


def test_lists_of_strides_may_be_written_to() -> None:
    layer, x = settled()
    layer.core.stride = stride = [1, 1]
    agrees(layer, x)
    stride[0] = 2
    agrees(layer, x)


class LowRank(nn.Module):
    """An adapter as LoRA libraries put it around a convolution."""

    def __init__(self, base: nn.Conv2d, rank: int = 2):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Conv2d(
            base.in_channels, rank, base.kernel_size, base.stride, base.padding, base.dilation, bias=False
        )
        self.lora_B = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_adapters_learn(part: str) -> None:
    layer, x = settled()
    before = layer(x).detach()
    adapter = LowRank(getattr(layer, part))
    setattr(layer, part, adapter)
    torch.testing.assert_close(layer(x).detach(), before, atol=1e-5, rtol=1e-5)
    steps = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(3):
        steps.zero_grad()
        (layer(x) - before - 1).square().mean().backward()
        steps.step()
    assert adapter.lora_B.weight.abs().max() > 0
    assert not torch.allclose(layer(x), before, atol=1e-4)
    agrees(layer, x)


def test_fake_quantization_is_heeded() -> None:
    from torch.ao.nn.qat import Conv2d
    from torch.ao.quantization import get_default_qat_qconfig

    layer, x = settled()
    before = layer(x).detach()
    layer.core.qconfig = get_default_qat_qconfig("x86")
    layer.core = Conv2d.from_float(layer.core.train())
    agrees(layer.eval(), x)
    assert not torch.allclose(layer(x), before)
    layer.train()(x).sum().backward()
    assert layer.core.weight.grad is not None


def test_counters_by_hooks_see_three_convolutions() -> None:
    """As thop, torchinfo and ptflops count: hooks on leaves, by their class."""
    layer, x = settled()
    counted = []

    def count(module: nn.Conv2d, inputs: tuple[Tensor], y: Tensor) -> None:
        counted.append(y.numel() * module.weight[0].numel())

    for module in layer.modules():
        if isinstance(module, nn.Conv2d):
            module.register_buffer("total_ops", torch.zeros(1))
            module.register_forward_hook(count)
    with torch.no_grad():
        layer(x)
    pixels = 2 * 9 * 8
    assert counted == [pixels * 4 * 6, pixels * 17 * 4 * 9, pixels * 20 * 17]


@pytest.mark.parametrize("name", ["forward", "_conv_forward"])
def test_counters_that_replace_methods_see_three_convolutions(name: str, monkeypatch) -> None:
    layer, x = settled()
    calls = []
    method = getattr(nn.Conv2d, name)
    monkeypatch.setattr(nn.Conv2d, name, lambda *args: calls.append(1) or method(*args))
    with torch.no_grad():
        layer(x)
    assert len(calls) == 3


def test_counters_that_replace_the_function_see_three_convolutions(monkeypatch) -> None:
    layer, x = settled()
    calls = []
    function = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args: calls.append(1) or function(*args))
    for mode in MODES:
        with mode():
            layer(x)
    assert len(calls) == 9


# ---- options


@pytest.mark.parametrize("activation", ["gelu", "RELU", "", 0, True, torch.relu, ["relu"]])
def test_wrong_activations_are_refused_when_they_are_set(activation) -> None:
    layer, x = settled()
    with pytest.raises(ValueError, match="activation must be None or 'relu'"):
        layer.activation = activation
    agrees(layer, x)


@pytest.mark.parametrize("recompute", [None, 1, "yes"])
def test_recompute_is_a_bool(recompute) -> None:
    layer, _ = settled()
    with pytest.raises(TypeError, match="recompute must be True or False"):
        layer.recompute = recompute


@pytest.mark.parametrize("change", [{"stride": (0, 1)}, {"padding": (-1, 0)}, {"dilation": (1, 0)}])
def test_geometry_that_no_convolution_has_is_refused(change) -> None:
    layer, x = settled()
    for name, value in change.items():
        setattr(layer.core, name, value)
    for mode in MODES:
        with mode(), pytest.raises((ValueError, RuntimeError)):
            layer(x)


def test_a_part_put_back_is_fast_again() -> None:
    layer, x = settled()
    core = layer.core
    layer.core = copy.deepcopy(core)
    agrees(layer, x)
    layer.core = core
    handle = core.register_forward_hook(lambda *_: None)
    agrees(layer, x)
    handle.remove()
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        core.forward = lambda x: x  # is not called again
        del core.forward
    agrees(layer, x)
