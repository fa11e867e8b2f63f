"""Which tensors and threads the compiled kernels may serve past torch's dispatcher.

Only plain ones: tensors of torch's own class with dense numbers in them, threads in which no mode, transform,
tracer, profiler or autocast wants to see operators. Both are asked by their dispatch keys, so that what torch
learns to wrap tomorrow is not plain either. All that is private to torch is looked up here; where torch no
longer has it, layers run as the three modules that they stand for.
"""

import logging

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules

from kegfast.ops import _native

_log = logging.getLogger(__name__)
_CLASSES = Tensor, nn.Parameter
_GLOBAL_HOOKS = (
    modules._global_forward_hooks, modules._global_forward_pre_hooks, modules._global_backward_hooks,
    modules._global_backward_pre_hooks,
)  # fmt: skip
# What runs a convolution, if no profiler has put functions of its own in the place of it.
_RUNS = (nn.Conv2d, "forward"), (nn.Conv2d, "_conv_forward"), (nn.functional, "conv2d")
_OWN = tuple((space, name, vars(space)[name]) for space, name in _RUNS)


def _keys(x: Tensor) -> int:
    return torch._C._dispatch_keys(x).raw_repr()


def _plain_tensors() -> tuple[Tensor, Tensor]:
    """A plain tensor, and one that was made in inference mode."""
    with torch.inference_mode(False):
        real = torch.empty(1)
    with torch.inference_mode():
        return real, torch.empty(1)


def _plain_keys() -> dict[str, set[int]]:
    """Those of plain tensors by device. CUDA's differ in what names the device; nothing is asked of it."""

    def of(*names: str) -> int:
        bits = 0
        for name in names:
            bits |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr()
        return bits

    cpu, change = {_keys(t) for t in _plain_tensors()}, of("CPU", "AutocastCPU") ^ of("CUDA", "AutocastCUDA")
    return {"cpu": cpu, "cuda": {keys ^ change for keys in cpu}}


def _teach_compiled_part() -> None:
    """Tells the compiled part what plain is."""
    included, excluded = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set
    quiet, words = [], []  # of a thread in which nothing is going on
    for mode in (False, True):
        with torch.inference_mode(mode):
            quiet.append((included().raw_repr(), excluded().raw_repr()))
            if (keys := _native._C.thread_keys()) is not None:
                words.append(keys)
    real, _ = plain = _plain_tensors()
    complex_numbers = torch.empty(1, dtype=torch.complex64)
    kinds = [
        *plain, complex_numbers, complex_numbers.conj(), torch._neg_view(real), torch.empty(1, device="meta"),
        real.to_sparse(), torch._efficientzerotensor(1), nn.Parameter(real),
    ]  # fmt: skip
    _native._C.learn_handles(torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs)
    _native._C.learn_torch(
        tensor=Tensor,
        parameter=nn.Parameter,
        kinds=[(kind, _keys(kind)) for kind in kinds],
        plain=list(map(_keys, plain)),
        included=included,
        excluded=excluded,
        quiet=quiet,
        quiet_words=words if len(words) == len(quiet) else [],
        watchers=[torch.autograd._profiler_enabled, torch._C._len_torch_function_stack],
        forward_ad=forward_ad,
        global_hooks=list(_GLOBAL_HOOKS),
        own=list(_RUNS),
    )  # fmt: skip


def _learn() -> dict[str, set[int]]:
    try:
        if _native._C is not None:
            _teach_compiled_part()
        return _plain_keys()
    except (AttributeError, RuntimeError, TypeError) as error:
        _log.warning("every call of a layer runs as three modules: %s", error)
        return {}


_PLAIN = _learn()


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether tensors, all on one device, are of torch's own class, and dense numbers in memory.

    Those of a transform or a compiler, of zeros without memory, negated, sparse or nested ones are not, nor
    are subclasses.
    """
    x = tensors[0]
    if x is None:
        return False
    if _native._C is not None and x.is_cpu:
        return _native._C.are_plain(*tensors)
    keys = _PLAIN.get(x.device.type, ())
    return all(t is None or (type(t) in _CLASSES and _keys(t) in keys) for t in tensors)


def watched() -> bool:
    """Whether something in this thread wants to see operators, or to change them."""
    return _native._C is None or _native._C.watched()


def convolutions_are_torchs() -> bool:
    """Whether nn.Conv2d runs as torch made it, with no hooks that are set for all modules."""
    return not any(_GLOBAL_HOOKS) and all(vars(space)[name] is value for space, name, value in _OWN)
