"""Which form a float32 Tucker-2 layer takes on the CPU: measured where that was done, else calculated.

Without a measurement the kernels choose by themselves: Winograd where its tiles are enough to pay for its
transforms, else the direct sum. `cpu_table.json` beside this file has, for each class of machines that was
measured, the shapes where that is not the fastest form; what `autotune` measures is kept in the user's file
and goes before it.
"""

import logging
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kegfast._util.check import expected
from kegfast._util.files import read_json, write_json
from kegfast._util.machine import part_of_a_file_name, processor
from kegfast._util.timing import interleaved
from kegfast.dispatch.cache import cache_folder, checked_forms, keep_choices, read_choices, releases
from kegfast.dispatch.calls import LayerCall
from kegfast.dispatch.forms import Form
from kegfast.dispatch.packed import Weights
from kegfast.ops import _native
from kegfast.ops._operands import Geometry

FORMS = (Form.DIRECT, Form.WINOGRAD, Form.CONVOLUTIONS)
Shape = tuple[int, ...]  # (N, C, H, W, R1, R2, K, kernel, geometry, channels_last, threads), pairs as two

PACKAGED = Path(__file__).with_name("cpu_table.json")

_log = logging.getLogger(__name__)
_table: dict[Shape, Form] | None = None  # None: no file was read yet
_unfused: set[Shape] = set()  # where torch's convolutions are faster
_TURN = 1e-3  # seconds


def shape_of(x: Tensor, core: Tensor, features: int, geometry: Geometry) -> Shape:
    """What the time of a call depends on."""
    r2, r1, kh, kw = core.shape
    pixels_first = x.stride(1) == 1 and x.shape[2] * x.shape[3] > 1
    pairs = [n for pair in geometry for n in pair]
    return *x.shape, r1, r2, features, kh, kw, *pairs, int(pixels_first), torch.get_num_threads()


def by_convolutions(x: Tensor, weights: Weights, geometry: Geometry) -> bool:
    """Whether torch's convolutions were measured to be faster for a layer's call outside autograd."""
    if _table is None:
        table()
    if not _unfused or x.dtype != torch.float32 or _native._backend == "native":
        return False
    return shape_of(x, weights[1], weights[2].shape[0], geometry) in _unfused


def tune(calls: Iterable[LayerCall]) -> dict[str, dict[str, float]]:
    """Measures every form of float32 layers at today's number of threads; later calls take the fastest.

    Returns:
        Per layer shape, the median seconds of each form. What is fastest is kept in `cache_path()`.
    """
    if _native._C is None:
        return {}
    times: dict[Shape, dict[Form, float]] = {}
    for call in calls:
        shape = shape_of(call.x, call.core, call.last.shape[0], call.geometry)
        if shape not in times and call.x.dtype == torch.float32:
            times[shape] = measure(call.layer, call.x, shape)
    known = table()
    known.update({shape: min(seconds, key=seconds.__getitem__) for shape, seconds in times.items()})
    for shape, seconds in times.items():
        _log.info("%s: %s of %s", name_of(shape), known[shape], seconds)
        prefer(shape, known[shape])
    keep_choices(cache_path(), {" ".join(map(str, shape)): form for shape, form in known.items()}, FORMS)
    return {name_of(shape): {form.value: s for form, s in each.items()} for shape, each in times.items()}


def measure(layer: Callable[[Tensor], Tensor], x: Tensor, shape: Shape) -> dict[Form, float]:
    """Median seconds of each form that this layer has, in turns; leaves the last one chosen."""
    chosen: Form | None = None

    def call(form: Form) -> None:
        nonlocal chosen
        if form != chosen:
            prefer(shape, form)
            chosen = form
        layer(x)

    def has(form: Form) -> bool:
        call(form)
        return runs() == form

    with torch.no_grad():
        forms = [form for form in FORMS if has(form)]
        # The first call of a turn settles the form. Other processes cost one thread's own clock little.
        clock = "cpu" if torch.get_num_threads() == 1 else "wall"
        calls = {form: partial(call, form) for form in forms}
        return interleaved(calls, 9, turn=_TURN, warm=True, clock=clock)


def runs() -> Form:
    """The form of the last call."""
    kernel = _native._C.last_kernel().split()[0].removesuffix("_f4")
    return Form.CONVOLUTIONS if kernel == "unfused" else Form(kernel)


def name_of(shape: Shape) -> str:
    """A line for people."""
    n, c, h, w, r1, r2, k, kh, kw, sh, sw, ph, pw, dh, dw, pixels_first, threads = shape
    layout = "channels_last" if pixels_first else "contiguous"
    core = f"{kh}x{kw} stride {sh},{sw} padding {ph},{pw} dilation {dh},{dw}"
    return f"{n}x{c}x{h}x{w} {layout} -> {r1} -> {r2} -> {k}, {core}, {threads} threads"


# ---- the table


def cache_path() -> Path:
    """This machine's file, by processor and instruction set."""
    name = part_of_a_file_name(f"{processor('cpu family', 'model')} {_isa()}")
    return cache_folder() / f"cpu-{name}.json"


def _isa() -> str:
    return str(_native.build_info()["isa_active"] or "none")


def machine_class() -> str:
    """What the packaged table is asked for: the instruction set and the sizes of a core's own caches."""
    sizes = {}
    for cache in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, kind, size = ((cache / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            sizes[level] = size
    return f"{_isa()}, L1 {sizes.get('1', 'unknown')}, L2 {sizes.get('2', 'unknown')}"


def table() -> dict[Shape, Form]:
    """What is known of this machine and these versions; reads the files when first asked."""
    global _table
    if _table is None:
        _table = {}
        for path, read in ((PACKAGED, read_packaged), (cache_path(), read_table)):
            try:
                _table.update(read(path) if path.exists() else {})
            except (ValueError, OSError, RuntimeError) as error:
                _log.warning("measured forms are left aside: %s", error)
        for shape, form in _table.items():
            prefer(shape, form)
    return _table


def prefer(shape: Shape, form: Form | None) -> None:
    """What later calls of this shape run; None for what the kernels choose by themselves."""
    if _native._C is None:
        return
    native_form = "automatic" if form in (None, Form.CONVOLUTIONS) else form
    _native._C.choose_tucker2(shape, getattr(_native._C.Tucker2Form, native_form))
    (_unfused.add if form == Form.CONVOLUTIONS else _unfused.discard)(shape)


def read_table(path: Path) -> dict[Shape, Form]:
    """The entries of a file that `autotune` wrote, none where other versions did.

    Raises:
        ValueError: for a file that holds anything else.
    """
    return _by_shape(read_choices(path, FORMS), path)


def read_packaged(path: Path) -> dict[Shape, Form]:
    """The entries of the packaged table for this class of machines, none where other releases made them.

    Raises:
        ValueError: for a file that holds anything else.
    """
    content = read_json(path)
    found = content.get(machine_class(), {"forms": {}})
    forms = _by_shape(checked_forms(found, FORMS, path), path)
    return forms if found.get("releases") == releases() else {}


def write_packaged(found: dict[Shape, Form], path: Path = PACKAGED) -> None:
    """Puts this machine's class into the packaged table; other classes stay."""
    content = read_json(path) if path.exists() else {}
    forms = {" ".join(map(str, shape)): form for shape, form in sorted(found.items())}
    write_json(path, content | {machine_class(): {"releases": releases(), "forms": forms}})


def _by_shape(found: dict[str, Form], path: Path) -> dict[Shape, Form]:
    if not all(re.fullmatch(r"\d+( \d+){16}", key) for key in found):
        raise ValueError(expected("path", "a file of forms that autotune measured", path))
    return {tuple(map(int, key.split())): Form(form) for key, form in found.items()}
