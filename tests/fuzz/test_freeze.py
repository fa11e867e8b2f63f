"""Random networks of everything that plans know, frozen, against torch."""

import random

import torch
import torch.nn.functional as F
from needs import needs_native
from torch import Tensor, nn

import kegfast
from kegfast.nn import TuckerConv2d

pytestmark = needs_native


class RandomNetwork(nn.Module):
    """Random steps over the values made so far."""

    def __init__(self, rng: random.Random, channels: int, size: tuple[int, int]):
        super().__init__()
        self.layers = nn.ModuleList()
        self.script: list[tuple] = []
        self.shapes = [(channels, *size)]
        for _ in range(rng.randint(2, 12)):
            self._grow(rng)
        self.head = rng.choice(("images", "mean", "flatten"))
        c, h, w = self.shapes[-1]
        self.linear = nn.Linear(c * h * w if self.head == "flatten" else c, rng.randint(1, 40))
        self.last = rng.choice(("none", "softmax", "log_softmax", "relu"))

    def _grow(self, rng: random.Random) -> None:
        at = rng.randrange(max(0, len(self.shapes) - 3), len(self.shapes))
        c, h, w = self.shapes[at]
        kind = rng.choice(
            ("conv",) * 4 + ("tucker",) * 3 + ("add",) * 3
            + ("norm", "activation", "activation", "max", "average", "adaptive")
            + ("gate", "cat", "pad", "stride", "dropout")
        )  # fmt: skip
        if kind in ("conv", "tucker"):
            kernel = [rng.choice((1, 1, 2, 3, 3, 3, 5)) for _ in range(2)]
            kernel = kernel if rng.random() < 0.2 else [kernel[0]] * 2
            dilation = [rng.choice((1, 1, 1, 2)) for _ in range(2)]
            stride = (
                [rng.choice((1, 1, 2, 3))] * 2
                if rng.random() < 0.8
                else [rng.randint(1, 3), rng.randint(1, 3)]
            )
            padding = [rng.randint(0, k) for k in kernel] if rng.random() < 0.3 else [k // 2 for k in kernel]
            out = [
                (n + 2 * p - d * (k - 1) - 1) // s + 1
                for n, p, d, k, s in zip((h, w), padding, dilation, kernel, stride, strict=True)
            ]
            if min(out) < 1:
                return
            features = rng.choice((1, 3, 7, 8, 16, 17, 24, 32, 48, 64, 70))
            bias = rng.random() < 0.7
            if kind == "tucker":
                rank = rng.choice(((4, 4), (16, 16), (32, 32), (3, 9), (8, 40), (64, 32)))
                layer = TuckerConv2d(
                    c, features, tuple(kernel), rank, tuple(stride), tuple(padding), tuple(dilation), bias
                )
            else:
                groups = rng.choice([g for g in (1, 1, 1, 2, 3, c) if c % g == 0])
                features = features * groups if groups < c or rng.random() < 0.3 else c
                features = min(features, 8 * c) if groups == c else features
                features -= features % groups
                layer = nn.Conv2d(c, features, kernel, stride, padding, dilation, groups, bias)
            self._layer(layer, at, (features, *out))
        elif kind == "norm":
            norm = nn.BatchNorm2d(c)
            nn.init.uniform_(norm.running_mean, -1, 1), nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2), nn.init.uniform_(norm.bias, -1, 1)
            self._layer(norm, at, (c, h, w))
        elif kind == "activation":
            choices = (
                nn.ReLU(),
                nn.SiLU(),
                nn.Hardswish(),
                nn.Sigmoid(),
                nn.Tanh(),
                nn.Hardsigmoid(),
                nn.ReLU6(),
            )
            self._layer(rng.choice((nn.ReLU(inplace=rng.random() < 0.3), *choices)), at, (c, h, w))
        elif kind in ("max", "average") and min(h, w) > 2:
            k, s, ceil = rng.randint(1, 3), rng.randint(1, 3), rng.random() < 0.3
            padding = rng.randint(0, k // 2)
            pool = (
                nn.MaxPool2d(k, s, padding, ceil_mode=ceil)
                if kind == "max"
                else nn.AvgPool2d(k, s, padding, ceil, rng.random() < 0.5, rng.choice((None, None, 5)))
            )
            self._layer(pool, at, tuple(pool(torch.zeros(1, c, h, w)).shape[1:]))
        elif kind == "adaptive":
            size = rng.randint(1, h), rng.randint(1, w)
            self._layer(nn.AdaptiveAvgPool2d(size), at, (c, *size))
        elif kind in ("add", "cat"):
            others = [
                i for i, s in enumerate(self.shapes) if s[1:] == (h, w) and (kind == "cat" or s[0] == c)
            ]
            other = rng.choice(others)
            total = c + self.shapes[other][0] if kind == "cat" else c
            if total < 400:
                self._script((kind, at, other), (total, h, w))
        elif kind == "pad":
            sides = [rng.randint(0, 2) for _ in range(6)]
            self._script(
                (kind, at, sides), (c + sides[4] + sides[5], h + sides[2] + sides[3], w + sides[0] + sides[1])
            )
        elif kind == "stride":
            sh, sw = rng.randint(1, 3), rng.randint(1, 3)
            self._script((kind, at, sh, sw), (c, -(-h // sh), -(-w // sw)))
        elif kind == "gate":
            self._script((kind, at), (c, h, w))
        elif kind == "dropout":
            self._layer(nn.Dropout(), at, (c, h, w))

    def _layer(self, layer: nn.Module, at: int, shape: tuple[int, ...]) -> None:
        self.layers.append(layer)
        self._script(("layer", at, len(self.layers) - 1), shape)

    def _script(self, entry: tuple, shape: tuple[int, ...]) -> None:
        self.script.append(entry)
        self.shapes.append(tuple(shape))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        values = [x]
        for kind, at, *rest in self.script:
            y = values[at]
            if kind == "layer":
                y = self.layers[rest[0]](y)
            elif kind == "add":
                y = y + values[rest[0]]
            elif kind == "cat":
                y = torch.cat((y, values[rest[0]]), 1)
            elif kind == "pad":
                y = F.pad(y, rest[0])
            elif kind == "stride":
                y = y[:, :, :: rest[0], :: rest[1]]
            elif kind == "gate":
                y = y * y.mean((2, 3), keepdim=True)
            values.append(y)
        y = values[-1]
        if self.head == "images":
            return y, values[len(values) // 2]
        y = self.linear(torch.flatten(y, 1) if self.head == "flatten" else y.mean((2, 3)))
        return {"none": y, "softmax": y.softmax(1), "log_softmax": y.log_softmax(1), "relu": y.relu()}[
            self.last
        ]


def test_random_networks(seeds):
    before = torch.get_num_threads()
    try:
        for seed in seeds(12):
            rng = random.Random(seed)
            torch.manual_seed(seed)
            torch.set_num_threads(rng.randint(1, 2))
            channels, size = rng.choice((1, 2, 3, 8, 16, 33)), (rng.randint(3, 40), rng.randint(3, 40))
            model = RandomNetwork(rng, channels, size).eval()
            isa = rng.choice(kegfast.build_info()["isa_compiled"][:3])
            try:
                context = kegfast.cpu_isa(isa)
                with context:
                    check(model, rng, channels, size, seed)
            except ValueError as error:
                if "instruction set" not in str(error):
                    raise
    finally:
        torch.set_num_threads(before)


def check(model: nn.Module, rng: random.Random, channels: int, size: tuple[int, int], seed: int) -> None:
    example = torch.randn(rng.randint(1, 4), channels, *size)
    frozen = kegfast.freeze(model, example)
    x = torch.randn(rng.choice((1, 2, 3, 8)), channels, *size)
    if rng.random() < 0.5:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        want = model.double()(x.double())
        model.float()
    for ours, theirs in zip(*(v if isinstance(v, tuple) else (v,) for v in (frozen(x), want)), strict=True):
        assert ours.shape == theirs.shape, seed
        scale = theirs.abs().max().item() + 1e-6
        assert ((ours - theirs).abs().max() <= 2e-4 * scale).item(), (
            seed,
            (ours - theirs).abs().max().item(),
            scale,
        )
