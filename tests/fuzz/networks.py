"""Random networks of convolutions and BatchNorms, with all that stands between folding one into the other."""

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from kegfast.nn import TuckerConv2d

CHANNELS, SIDE = 6, 7


class WithActivation(nn.BatchNorm2d):
    """A BatchNorm that does more than one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class WithOptions(nn.BatchNorm2d):
    """A BatchNorm by another name, as timm's are."""

    def __init__(self, features: int, act: bool = True):
        super().__init__(features)
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )
        return self.act(x)


class Doubled(nn.Conv2d):
    """A convolution with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) + 1


class Standardized(nn.Conv2d):
    """A convolution by other weights than its own."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def conv(draw: random.Random) -> nn.Module:
    size = draw.choice((1, 3))
    options = {"padding": size // 2, "bias": draw.random() < 0.5}
    kind = draw.choice((nn.Conv2d, nn.Conv2d, nn.Conv2d, TuckerConv2d, Doubled, Standardized))
    if kind is TuckerConv2d:
        return kind(CHANNELS, CHANNELS, 3, (3, 4), padding=1, bias=options["bias"])
    groups = draw.choice((1, 1, 2, CHANNELS))
    return kind(
        CHANNELS, CHANNELS, size, groups=groups, padding_mode=draw.choice(("zeros", "reflect")), **options
    )


def norm(draw: random.Random) -> nn.Module:
    made = draw.choice(
        (
            lambda: nn.BatchNorm2d(CHANNELS),
            lambda: nn.BatchNorm2d(CHANNELS),
            lambda: nn.BatchNorm2d(CHANNELS, affine=False),
            lambda: nn.BatchNorm2d(CHANNELS, eps=0.5),
            lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
            lambda: WithActivation(CHANNELS),
            lambda: WithOptions(CHANNELS, draw.random() < 0.5),
            lambda: nn.GroupNorm(2, CHANNELS),
        )
    )()
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    for tensor in [*made.parameters(), *made.buffers()]:
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.3)
    return made


def activation(draw: random.Random) -> nn.Module:
    kinds = nn.ReLU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Identity, nn.Dropout, nn.Hardswish
    kind = draw.choice(kinds)
    return kind(inplace=True) if kind is nn.ReLU and draw.random() < 0.4 else kind()


def pooling(draw: random.Random) -> nn.Module:
    return (
        nn.MaxPool2d(3, stride=1, padding=1) if draw.random() < 0.7 else nn.AvgPool2d(3, stride=1, padding=1)
    )


def chain(draw: random.Random) -> nn.Module:
    """Some of them in a row."""
    kinds: tuple[Callable[[random.Random], nn.Module], ...] = (conv, norm, activation)
    return nn.Sequential(*(kind(draw) for kind in kinds[: draw.choice((2, 3))]))


MODULES = (conv, conv, conv, norm, norm, norm, activation, activation, pooling, chain, chain)


STEPS = (
    ("module", 10), ("again", 1), ("add", 3), ("relu", 2), ("relu_", 1), ("scale", 1), ("read", 0.5),
)  # fmt: skip


class Network(nn.Module):
    """A list of steps over the values computed so far.

    Args:
        draw: Of everything.
        steps: How many.
        forked: Whether its way depends on a value, so that it cannot be traced.
    """

    def __init__(self, draw: random.Random, steps: int, forked: bool):
        super().__init__()
        self.forked = forked
        self.layers = nn.ModuleList()
        self.plan: list[tuple[str, int, int]] = []
        for step in range(steps):
            # Mostly the latest value: only neighbors are folded.
            source = step if draw.random() < 0.8 else draw.randrange(step + 1)
            kinds, weights = zip(*STEPS, strict=True)
            what = draw.choices(kinds, weights)[0]
            if what == "module" or not len(self.layers):
                self.layers.append(draw.choice(MODULES)(draw))
                self.plan.append(("module", source, len(self.layers) - 1))
            elif what == "add":
                self.plan.append(("add", source, draw.randrange(step + 1)))
            else:
                self.plan.append((what, source, draw.randrange(len(self.layers))))
        head = nn.Sequential(nn.Linear(CHANNELS, 5), nn.BatchNorm1d(5))
        self.head = head if draw.random() < 0.5 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for what, source, which in self.plan:
            value = values[source]
            if what in ("module", "again"):
                value = self.layers[which](value)
            elif what == "add":
                value = value + values[which]
            elif what == "relu":
                value = F.relu(value)
            elif what == "relu_":
                value = F.relu_(value + 0.0)
            elif what == "scale":
                value = value * 0.5
            else:
                value = value * next((p.mean() for p in self.layers[which].parameters()), 1.0)
            if self.forked and float(value.detach().flatten()[0]) > 1e30:
                value = -value
            values.append(value)
        if isinstance(self.head, nn.Identity):
            return values[-1]
        return self.head(values[-1].mean((2, 3)))


def hooked(model: nn.Module, draw: random.Random) -> None:
    module = draw.choice(list(model.modules())[1:])
    module.register_forward_hook(lambda _, __, y: y + 0.5 if isinstance(y, Tensor) else y)


def tied(model: nn.Module, draw: random.Random) -> None:
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    draw.shuffle(convs)
    for one in convs[1:]:
        if one.weight.shape == convs[0].weight.shape and "weight" in one._parameters:
            one.weight = convs[0].weight
            return


def parametrized(model: nn.Module, draw: random.Random) -> None:
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and "weight" in m._parameters]
    if convs:
        one = draw.choice(convs)
        if draw.random() < 0.5:
            parametrizations.weight_norm(one)
        else:
            prune.l1_unstructured(one, "weight", 0.5)


def twice(model: nn.Module, draw: random.Random) -> None:
    """A module under two names."""
    containers = [m for m in model.modules() if isinstance(m, nn.Sequential)]
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.shape[0] == CHANNELS]
    convs = [m for m in convs if m.in_channels == CHANNELS]
    if containers and convs:
        container = draw.choice(containers)
        if isinstance(container[0], nn.Conv2d):
            container[0] = draw.choice(convs)


def frozen(model: nn.Module, draw: random.Random) -> None:
    model.requires_grad_(False)


def network(seed: int) -> nn.Module:
    """A network in eval mode, in double precision."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = Network(draw, draw.randrange(2, 10), draw.random() < 0.25)
    for change in (hooked, tied, parametrized, twice, frozen):
        if draw.random() < 0.15:
            change(model, draw)
    return model.double().eval()
