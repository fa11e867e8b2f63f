"""Networks of which something must not be folded, each for a reason of its own."""

import copy

import torch.nn.functional as F
from odd import randomise_norms
from torch import nn
from torch.nn.utils import prune

from kegfast import compress
from kegfast.nn import TuckerConv2d


def block(conv=None, norm=None):
    """A convolution and a BatchNorm with statistics that one sees in the outputs."""
    model = nn.Sequential(conv or nn.Conv2d(3, 8, 3), norm or nn.BatchNorm2d(8))
    if model[1].track_running_stats:
        randomise_norms(model)
    return model


def tied():
    model = nn.Sequential(
        block(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), block(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    )
    model[1][0].weight = model[0][0].weight
    return model


def pruned():
    model = nn.Sequential(block(), block(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)))
    prune.global_unstructured(
        [(model[0][0], "weight"), (model[1][0], "weight")], prune.L1Unstructured, amount=0.5
    )
    return model


def masked():
    model = block()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    return model


def factored(change):
    """A factored convolution whose last part is changed."""

    def make():
        model = compress(block(), {"0": (2, 4)})[0]
        assert type(model[0]) is TuckerConv2d
        change(model[0].last)
        return model

    return make


def normed(change):
    def make():
        model = block()
        change(model[0])
        return model

    return make


def hooked(name, pre=False):
    """With a hook that one sees in the outputs."""

    def make():
        model = nn.Sequential(block())
        module = model.get_submodule(name)
        if pre:
            module.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        else:
            module.register_forward_hook(lambda module, args, output: output * 2 + 1)
        return model

    return make


class Doubled(nn.Conv2d):
    """torch.nn's name, another forward."""

    def forward(self, x):
        return 2 * super().forward(x)


class Standardized(nn.Conv2d):
    """Its weight is not what its forward multiplies by."""

    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / self.weight.std((1, 2, 3), keepdim=True), self.bias)


def patched():
    model = block()
    conv = copy.deepcopy(model[0])
    model[0].forward = lambda x: conv(x) ** 2
    return model


class Scaled(nn.BatchNorm2d):
    """No BatchNorm: its input is changed first."""

    def forward(self, x):
        return super().forward(x * 3)


class Skipping(nn.BatchNorm2d):
    """No BatchNorm with something behind it."""

    def forward(self, x):
        return super().forward(x) + x


class Stubborn(nn.BatchNorm2d):
    """Stays in train mode: on the batch's statistics."""

    def train(self, mode=True):
        return super().train(True)


class ReadsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = block()

    def forward(self, x):
        return self.body(x) * self.body[0].weight.abs().mean()


class ReadsNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = block()

    def forward(self, x):
        return self.body(x) * self.body[1].weight.mean()


class Inside(nn.Module):
    """A layer inside a module with a hook, which is called whole, and by itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = block().children()
        self.whole = nn.Sequential(self.conv)
        self.whole.register_forward_hook(lambda module, args, output: output + 1)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.whole(x)


class Untraceable(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.body = nn.Sequential(*parts)

    def forward(self, x):
        return self.body(x if float(x.sum()) > 0 else -x)
