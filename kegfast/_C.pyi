"""The compiled part: what it was built with, knobs of its kernels, repeated calls of layers, frozen networks.

Its operators are in `torch.ops.kegfast`.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from types import ModuleType
from typing import NotRequired, TypedDict

from torch import Tensor, nn

# What it was built with, what runs (module.cpp)

class _BuildInfo(TypedDict):
    compiler: str
    isa_compiled: list[str]
    isa_left_out: NotRequired[str]  # why
    isa_detected: str
    isa_active: str

def build_info() -> _BuildInfo: ...
def set_isa(name: str) -> str: ...  # the one that was taken
def last_kernel() -> str: ...
def note_unfused() -> None: ...
def vector_issue_rate() -> float: ...  # a second, of one core
def multiply_add_rate(bfloat16: bool = False) -> float: ...
def pairs_bfloat16() -> bool: ...  # whether the processor multiplies it

class L1Kernel(Enum):
    automatic = ...
    sort = ...
    pairs = ...

class Tucker2Form(Enum):
    automatic = ...
    direct = ...
    winograd = ...

def force_l1_kernel(kernel: L1Kernel) -> None: ...
def choose_tucker2(shape: Sequence[int], form: Tucker2Form) -> None: ...  # of dispatch.cpu.Shape
def tucker2_winograd() -> int: ...  # the largest of its tiles
def set_tucker2_winograd(most: int) -> None: ...

# What is plain to torch (plain.cpp)

def are_plain(*tensors: Tensor | None) -> bool: ...
def watched() -> bool: ...
def thread_keys() -> list[int] | None: ...
def learn_handles(own: object) -> None: ...
def learn_torch(
    *,
    tensor: type[Tensor],
    parameter: type[nn.Parameter],
    kinds: Sequence[tuple[Tensor, int]],
    plain: Sequence[int],
    included: Callable[[], object],
    excluded: Callable[[], object],
    quiet: Sequence[Sequence[int]],
    quiet_words: Sequence[Sequence[int]],
    watchers: Sequence[Callable[[], object]],
    forward_ad: ModuleType,
    global_hooks: Sequence[Mapping[int, object]],
    own: Sequence[tuple[object, str]],
) -> None: ...

# Repeated calls of a layer (tucker2_repeat.cpp)

def see_parts(modules: Mapping[str, object]) -> object: ...
def parts_unchanged(parts: object | None, modules: Mapping[str, object]) -> bool: ...
def same_bytes(tensors: tuple[Tensor, ...], copies: tuple[Tensor, ...]) -> bool: ...
def settle_tucker2(
    *,
    parts: object,
    activation: str | None,
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    copies: tuple[Tensor, ...],
    packed: Tensor,
    addend: Tensor | float | None,
    final: bool,
    geometry: Sequence[int],
) -> object: ...
def repeat_tucker2(
    settled: object | None,
    modules: Mapping[str, object],
    activation: str | None,
    x: Tensor,
    addend: Tensor | float | None,
    /,
) -> Tensor | None: ...  # None where something has changed
def unsettle() -> None: ...

# Frozen networks (frozen.cpp)

class FrozenNetwork: ...

class FrozenPlan:
    @property
    def address(self) -> int: ...
    @property
    def output_sizes(self) -> list[list[int]]: ...
    def seconds(self, addresses: Sequence[int]) -> list[float]: ...  # of each step

def read_frozen(bytes: bytes) -> FrozenNetwork: ...
def plan_frozen(
    network: FrozenNetwork, sizes: Sequence[Sequence[int]], strides: Sequence[Sequence[int]], threads: int
) -> FrozenPlan: ...
def run_frozen(*addresses: int) -> bool: ...  # False: not for the active instruction set
