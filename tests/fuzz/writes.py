"""Ways in which weights come to be others than they were, as users write them.

Each takes a module with parts `first`, `core` and `last` and a source of draws, changes the module and gives
the one to go on with.
"""

import copy
import ctypes
import io
import pickle
import random
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import (
    parameters_to_vector,
    parametrizations,
    parametrize,
    prune,
    remove_weight_norm,
    vector_to_parameters,
)
from torch.nn.utils import weight_norm as hooked_weight_norm

PARTS = ("first", "core", "last")


class Three(nn.Module):
    """The three convolutions that a Tucker-2 layer stands for."""

    def __init__(self, first: nn.Module, core: nn.Module, last: nn.Module):
        super().__init__()
        self.first, self.core, self.last = first, core, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.core(self.first(x)))


def normal(draw: random.Random, shape: tuple[int, ...], like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    return torch.randn(shape, generator=generator).to(like)


def part_of(module: nn.Module, draw: random.Random) -> nn.Module:
    return getattr(module, draw.choice(PARTS))


def weight_of(module: nn.Module, draw: random.Random) -> nn.Parameter:
    """A parameter of a part: its weight, or what hooks and parametrizations make that of."""
    part = part_of(module, draw)
    # Of a frozen part, torch may leave a weight that is no parameter when a normalization goes again.
    return draw.choice([p for p in part.parameters() if p.dim() == 4] or [part.weight])


def index_of(draw: random.Random, weight: Tensor) -> tuple[Any, ...]:
    """An element, a filter, an input channel or a tap."""
    element = [draw.randrange(n) for n in weight.shape]
    return draw.choice(
        [
            tuple(element),
            (element[0],),
            (slice(None), element[1]),
            (..., *element[2:]),
            (slice(None, None, 2),),
        ]
    )


def is_plain(part: nn.Module) -> bool:
    """Whether its weight is a parameter of its own, with neither hooks nor parametrizations."""
    return (
        "weight" in part._parameters and not part._forward_pre_hooks and not parametrize.is_parametrized(part)
    )


def by_data(module: nn.Module, draw: random.Random) -> nn.Module:
    weight = weight_of(module, draw)
    weight.data[index_of(draw, weight)] += draw.uniform(-2, 2)
    return module


def scaled_by_data(module: nn.Module, draw: random.Random) -> nn.Module:
    weight = weight_of(module, draw)
    weight.data[index_of(draw, weight)] *= draw.choice((0.0, 0.5, -1.0))
    return module


def by_numpy(module: nn.Module, draw: random.Random) -> nn.Module:
    weight = weight_of(module, draw)
    weight.detach().numpy()[index_of(draw, weight)] = draw.uniform(-2, 2)
    return module


def by_address(module: nn.Module, draw: random.Random) -> nn.Module:
    weight = weight_of(module, draw).detach()
    if weight.is_contiguous():
        other = normal(draw, tuple(weight.shape), weight)
        ctypes.memmove(weight.data_ptr(), other.data_ptr(), weight.numel() * weight.element_size())
    return module


def unversioned(module: nn.Module, draw: random.Random) -> nn.Module:
    weight = weight_of(module, draw)
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
        weight[index_of(draw, weight)] = draw.uniform(-2, 2)
    return module


def in_place(module: nn.Module, draw: random.Random) -> nn.Module:
    weight = weight_of(module, draw)
    with torch.no_grad():
        weight.copy_(normal(draw, tuple(weight.shape), weight))
        weight.mul_(0.5)
    return module


def in_inference_mode(module: nn.Module, draw: random.Random) -> nn.Module:
    weight = weight_of(module, draw)
    with torch.inference_mode():
        weight.add_(draw.uniform(-0.5, 0.5))
    return module


def by_state_dict(module: nn.Module, draw: random.Random) -> nn.Module:
    state = {name: normal(draw, tuple(t.shape), t) for name, t in sorted(module.state_dict().items())}
    module.load_state_dict(state, assign=draw.random() < 0.5)
    return module


def by_gradient_steps(module: nn.Module, draw: random.Random) -> nn.Module:
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        return module
    kind, options = draw.choice(
        [
            (torch.optim.SGD, {"lr": 0.05}),
            (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "foreach": True}),
            (torch.optim.SGD, {"lr": 0.05, "fused": True}),
        ]
    )
    optimizer = kind(parameters, **options)
    like = parameters[0]
    x = normal(draw, (2, module.first.in_channels, 9, 8), like)
    with torch.enable_grad():
        for _ in range(2):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
    optimizer.zero_grad()
    return module


def new_parameter(module: nn.Module, draw: random.Random) -> nn.Module:
    part = part_of(module, draw)
    if is_plain(part):
        part.weight = nn.Parameter(normal(draw, tuple(part.weight.shape), part.weight))
    return module


def new_data(module: nn.Module, draw: random.Random) -> nn.Module:
    weight = weight_of(module, draw)
    weight.data = normal(draw, tuple(weight.shape), weight)
    return module


def on_foreign_memory(module: nn.Module, draw: random.Random) -> nn.Module:
    """A parameter over numpy's memory, which changes later."""
    part = part_of(module, draw)
    if is_plain(part) and not part.weight.requires_grad:
        array = normal(draw, tuple(part.weight.shape), part.weight).numpy()
        part.weight = nn.Parameter(torch.from_numpy(array), requires_grad=False)
        with torch.no_grad():
            for _ in range(3):
                module(normal(draw, (1, module.first.in_channels, 9, 8), part.weight))
        array *= draw.uniform(-1, 1)
    return module


def swapped_tensors(module: nn.Module, draw: random.Random) -> nn.Module:
    part = part_of(module, draw)
    if is_plain(part):
        other = nn.Parameter(normal(draw, tuple(part.weight.shape), part.weight))
        torch.utils.swap_tensors(part.weight, other)
    return module


def another_part(module: nn.Module, draw: random.Random) -> nn.Module:
    """A convolution in a part's place, with a bias, other padding or more filters of its own choice."""
    name = draw.choice(PARTS)
    old = getattr(module, name)
    torch.manual_seed(draw.randrange(2**31))
    mode = draw.choice(("zeros", "reflect")) if name == "core" else "zeros"
    new = nn.Conv2d(
        old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation,
        bias=draw.random() < 0.5, padding_mode=mode,
    )  # fmt: skip
    setattr(module, name, new.to(old.weight))
    return module


def another_bias(module: nn.Module, draw: random.Random) -> nn.Module:
    last = module.last
    value = normal(draw, (last.out_channels,), last.weight.detach())
    last.bias = None if draw.random() < 0.3 else nn.Parameter(value)
    return module


def bias_by_data(module: nn.Module, draw: random.Random) -> nn.Module:
    if module.last.bias is not None:
        module.last.bias.data[draw.randrange(len(module.last.bias))] -= draw.uniform(-3, 3)
    return module


def by_vector(module: nn.Module, draw: random.Random) -> nn.Module:
    parameters = list(module.parameters())
    vector = parameters_to_vector([p.detach().contiguous() for p in parameters])
    vector_to_parameters(normal(draw, tuple(vector.shape), vector), parameters)
    return module


def pruned(module: nn.Module, draw: random.Random) -> nn.Module:
    part = part_of(module, draw)
    if not is_plain(part) or not part.weight.is_contiguous():  # torch prunes no others
        return module
    prune.l1_unstructured(part, "weight", draw.uniform(0.1, 0.9))
    if draw.random() < 0.5:
        prune.remove(part, "weight")
    return module


def weight_normed(module: nn.Module, draw: random.Random) -> nn.Module:
    part = part_of(module, draw)
    if not is_plain(part):
        return module
    if draw.random() < 0.5:
        hooked_weight_norm(part)
        part.weight_g.data *= draw.uniform(0.5, 2)
        if draw.random() < 0.3:
            remove_weight_norm(part)
    else:
        parametrizations.weight_norm(part)
        part.parametrizations.weight.original0.data *= draw.uniform(0.5, 2)
        if draw.random() < 0.3:
            parametrize.remove_parametrizations(part, "weight")
    return module


def hooked(module: nn.Module, draw: random.Random) -> nn.Module:
    """A hook that changes what a part gives or takes; sometimes it goes again."""
    part, factor = part_of(module, draw), draw.uniform(0.5, 2)
    if draw.random() < 0.5:
        handle = part.register_forward_hook(lambda _, __, y: y * factor)
    else:
        handle = part.register_forward_pre_hook(lambda _, args: (args[0] * factor,))
    if draw.random() < 0.5:
        handle.remove()
    return module


def copied(module: nn.Module, draw: random.Random) -> nn.Module:
    """A deep copy, whose original changes afterwards."""
    if any(
        not value.is_leaf
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor)
    ):
        return module  # torch copies no pruned module
    made = copy.deepcopy(module)
    module.core.weight.data.zero_()
    return made


def pickled(module: nn.Module, draw: random.Random) -> nn.Module:
    hooks = "_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks"
    if any(getattr(part, name) for part in module.modules() for name in hooks):
        return module  # functions of no module are not pickled
    if any(parametrize.is_parametrized(part) for part in module.modules()):
        return module
    if draw.random() < 0.5:
        return pickle.loads(pickle.dumps(module))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def cast(module: nn.Module, draw: random.Random) -> nn.Module:
    return module.to(draw.choice((torch.float32, torch.float64)))


def laid_out(module: nn.Module, draw: random.Random) -> nn.Module:
    return module.to(memory_format=draw.choice((torch.channels_last, torch.contiguous_format)))


def frozen(module: nn.Module, draw: random.Random) -> nn.Module:
    if all(is_plain(part) for part in (module.first, module.core, module.last)):
        module.requires_grad_(draw.random() < 0.5)
    return module


def called_with_others(module: nn.Module, draw: random.Random) -> nn.Module:
    """`functional_call` leaves the module as it was."""
    state = {name: normal(draw, tuple(t.shape), t) for name, t in sorted(module.named_parameters())}
    like = next(module.parameters())
    with torch.no_grad():
        torch.func.functional_call(module, state, (normal(draw, (1, module.first.in_channels, 9, 8), like),))
    return module


def in_a_thread(module: nn.Module, draw: random.Random) -> nn.Module:
    """Written by another thread, while a third one calls."""
    like = next(module.parameters()).detach()
    x = normal(draw, (1, module.first.in_channels, 9, 8), like)

    def call() -> None:
        with torch.no_grad():
            for _ in range(5):
                module(x)

    threads = [threading.Thread(target=by_data, args=(module, draw)), threading.Thread(target=call)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return module


WRITES: tuple[Callable[[nn.Module, random.Random], nn.Module], ...] = (
    by_data, scaled_by_data, by_numpy, by_address, unversioned, in_place, in_inference_mode, by_state_dict,
    by_gradient_steps, new_parameter, new_data, on_foreign_memory, swapped_tensors, another_part,
    another_bias, bias_by_data, by_vector, pruned, weight_normed, hooked, copied, pickled, cast, laid_out,
    frozen, called_with_others, in_a_thread,
)  # fmt: skip
