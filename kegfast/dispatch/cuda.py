"""Which form a Tucker-2 layer takes on a CUDA device: the fastest measured one, else torch's convolutions.

A form is only taken where it was measured on this card, its answer right, and not slower than torch's own
three convolutions, both called one by one and as a CUDA graph. `autotune` measures a model's layers; with
`torch.backends.cudnn.benchmark` a shape is also measured when it is first called. What was measured is kept
in a file and read by later processes.
"""

import logging
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kegfast._util.timing import Name
from kegfast.dispatch.cache import cache_folder, keep_choices, read_choices, write_choices
from kegfast.dispatch.calls import LayerCall
from kegfast.dispatch.forms import Form
from kegfast.ops import _native, reference
from kegfast.ops._operands import Geometry

Times = dict[Form, dict[str, float]]  # form -> {"eager": ms, "graph": ms}
FORMS: dict[Form, int | None] = {
    Form.FUSED: 1,
    Form.STAGES: 2,
    Form.PERSISTENT: 3,
    Form.CONVOLUTIONS: None,
}
"""The forms by their number in `torch.ops.kegfast.tucker2_as`; None stands for torch's convolutions."""

MOST_ERROR = 3e-2
"""Of a form's answer, relative: half precision rounds t1 and t2, TF32 every factor."""

_log = logging.getLogger(__name__)
PACKAGED = Path(__file__).with_name("cuda_table.json")
_measured: dict[str, Form] | None = None  # None: no file was read yet
_chosen: dict[tuple[object, ...], int | None] = {}  # of the calls seen since the table last changed
_tf32: bool | None = None


def form(
    x: Tensor,  # (N, C, H, W)
    first: Tensor,  # (R1, C, 1, 1)
    core: Tensor,  # (R2, R1, kh, kw)
    last: Tensor,  # (K, R2, 1, 1)
    geometry: Geometry,
    training: bool,
) -> int | None:
    """What takes this call on x's device: a number for `tucker2_as`, 0 where the operator shall choose.

    None stands for torch's convolutions. `kegfast.backend("native")` insists on the compiled operator.
    """
    if _native._backend == "native":
        _follow_tf32()
        return 0
    if torch.compiler.is_compiling():  # the shapes may be symbols; inductor fuses convolutions by itself
        return None
    tf32 = _follow_tf32()
    key = (
        x.shape, x.dtype, x.stride(1) == 1, x.device.index, first.shape, core.shape, core.stride(1) == 1,
        last.shape, geometry, training, tf32,
    )  # fmt: skip
    try:
        return _chosen[key]
    except KeyError:
        name = _key(x, first, core, last, geometry, training)
        taken = table().get(name)
        if taken is None and torch.backends.cudnn.benchmark and not torch.cuda.is_current_stream_capturing():
            times = _measure_forms(x, first, core, last, geometry, training)
            taken = _keep({name: times})[name]
        if taken is not None or not torch.backends.cudnn.benchmark:
            _chosen[key] = FORMS[taken or Form.CONVOLUTIONS]
        return FORMS[taken or Form.CONVOLUTIONS]


def _follow_tf32() -> bool:
    """Tells the library whether float32 may be rounded to TF32, as torch's convolutions are told."""
    global _tf32
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # made at run time
    allowed = convolutions.fp32_precision == "tf32"  # allow_tf32 raises once this one was set
    if allowed != _tf32:
        torch.ops.kegfast.cuda_allow_tf32(allowed)
        _tf32 = allowed
    return allowed


def _key(
    x: Tensor, first: Tensor, core: Tensor, last: Tensor, geometry: Geometry, training: bool
) -> str:  # what a time depends on, beside versions
    layouts = " ".join("nhwc" if t.stride(1) == 1 else "nchw" for t in (x, core))
    shapes = " ".join("x".join(map(str, t.shape)) for t in (x, first, core, last))
    precision = f"{x.dtype}{' tf32' * (x.dtype == torch.float32 and _follow_tf32())}"
    what = f"{shapes} | {tuple(geometry)} | {'training' if training else 'inference'}"
    return f"{torch.cuda.get_device_name(x.device)} | {precision} {layouts} | {what}"


def tune(calls: Iterable[LayerCall], training: bool = False) -> dict[str, dict[str, dict[str, float]]]:
    """Measures every form of layers on their device; later calls take the fastest.

    A form has to be at least as fast as torch's convolutions both eagerly and as a CUDA graph. The choice
    is kept in `cache_path()` for later processes.

    Args:
        calls: on a CUDA device.
        training: measure a forward and a backward pass, else inference alone (default).

    Returns:
        Per layer shape and form, milliseconds a call (medians, interleaved): "eager" and "graph".
    """
    _follow_tf32()
    times: dict[str, Times] = {}
    for _, x, first, core, last, geometry in calls:
        arguments = x, first, core, last, geometry
        key = _key(*arguments, training)
        if key not in times:
            times[key] = _measure_forms(*arguments, training)
    _keep(times)
    return {key: {form.value: ms for form, ms in each.items()} for key, each in times.items()}


def fastest(times: Times) -> Form:
    """The form with the shortest graph among those never slower than torch's convolutions."""
    floor = times[Form.CONVOLUTIONS]
    fit = [f for f, ms in times.items() if all(ms[way] <= floor[way] for way in floor)]
    return Form(min(fit, key=lambda f: times[f]["graph"]))


def _measure_forms(
    x: Tensor, first: Tensor, core: Tensor, last: Tensor, geometry: Geometry, training: bool
) -> Times:
    x, first, core, last = (
        t.detach().clone(memory_format=torch.preserve_format) for t in (x, first, core, last)
    )
    ints = [n for pair in geometry for n in pair]
    ops = torch.ops.kegfast

    def forward(name: Form) -> Tensor:
        number = FORMS[name]
        if number is None:
            return reference.tucker_conv2d(x, first, core, last, None, *geometry, None)
        if training:
            return ops.tucker2_forward(x, first, core, last, None, *ints, False, True)[0]
        return ops.tucker2_as(x, first, core, last, None, *ints, False, number)

    def step(name: Form) -> Callable[[], object]:
        if not training:
            return lambda: forward(name)
        return lambda: torch.autograd.grad(forward(name), (x, first, core, last), grad)

    with torch.inference_mode(False), torch.set_grad_enabled(training):
        if training:
            x, first, core, last = (t.clone().requires_grad_() for t in (x, first, core, last))
            grad = torch.ones_like(reference.tucker_conv2d(x, first, core, last, None, *geometry, None))
        names = [name for name in FORMS if name in (Form.FUSED, Form.CONVOLUTIONS) or not training]
        want = forward(Form.CONVOLUTIONS)
        names = [n for n in names if FORMS[n] is None or _is_right(n, partial(forward, n), want)]
        return measure({name: step(name) for name in names}, device=x.device)


def _is_right(name: str, run: Callable[[], Tensor], want: Tensor) -> bool:
    """Whether a form answers what torch's convolutions do; the log names one that does not, or fails."""
    try:
        got = run()
    except RuntimeError as error:
        _log.warning("Tucker-2's form %s is left aside: %s", name, error)
        return False
    want = want.float()
    off = ((got.float() - want).norm() / want.norm().clamp_min(1e-30)).item()
    if off <= MOST_ERROR or not want.isfinite().all():
        return True
    _log.warning("Tucker-2's form %s is left aside: its answer is off by %.2g", name, off)
    return False


def measure(
    runners: Mapping[Name, Callable[[], object]],
    rounds: int = 9,
    turn_ms: float = 2,
    graphs: Collection[str] | None = None,
    device: torch.device | None = None,
) -> dict[Name, dict[str, float]]:
    """Milliseconds per call: medians over interleaved rounds, each of about `turn_ms` and one call at least.

    "eager": calls one after another; "graph": the replay of a CUDA graph of as many calls, for those named
    in `graphs` (default all). `device`: where the runners work, whose stream is timed (default: the current
    one).
    """
    with torch.cuda.device(device):
        return _measure(runners, rounds, turn_ms, graphs)


def _measure(
    runners: Mapping[Name, Callable[[], object]], rounds: int, turn_ms: float, graphs: Collection[str] | None
) -> dict[Name, dict[str, float]]:
    turns: dict[tuple[Name, str], Callable[[], object]] = {}
    repeats: dict[Name, int] = {}
    for name, run in runners.items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        repeats[name] = count = max(1, min(50, round(turn_ms / _elapsed(run))))
        turns[name, "eager"] = partial(_repeat, run, count)
        if graphs is None or name in graphs:
            graph = torch.cuda.CUDAGraph()
            # On a stream of this device: the default one is the first device's that captured.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                for _ in range(count):
                    run()
            turns[name, "graph"] = graph.replay
    samples: dict[tuple[Name, str], list[float]] = {turn: [] for turn in turns}
    for _ in range(rounds):
        for turn, body in turns.items():
            samples[turn].append(_elapsed(body) / repeats[turn[0]])
    times: dict[Name, dict[str, float]] = {name: {} for name in runners}
    for (name, way), values in samples.items():
        times[name][way] = statistics.median(values)
    return times


def _repeat(run: Callable[[], object], count: int) -> None:
    for _ in range(count):
        run()


def _elapsed(body: Callable[[], object]) -> float:  # milliseconds on the current stream
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    body()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


# ---- the table


def cache_path() -> Path:
    """This user's file."""
    return cache_folder() / "cuda.json"


def table() -> dict[str, Form]:
    """What is known of this machine and these versions: shape -> form."""
    global _measured
    if _measured is None:
        _measured = {}
        for path in (PACKAGED, cache_path()):
            if path.exists():
                try:
                    load_table(path)
                except (ValueError, OSError) as error:
                    _log.warning("%s is left aside: %s", path, error)
    return _measured


def _keep(times: dict[str, Times]) -> dict[str, Form]:
    """Enters what was measured, here and in the user's file; the forms."""
    found = {key: fastest(ms) for key, ms in times.items()}
    for key, ms in times.items():
        _log.info("%s: %s of %s", key, found[key], ms)
    known = table()
    known.update(found)
    _chosen.clear()
    keep_choices(cache_path(), known, FORMS)
    return found


def save_table(path: str | Path) -> None:
    """Writes `table()` as JSON, with the versions that it holds for."""
    write_choices(Path(path), table())


def load_table(path: str | Path) -> None:
    """Adds the entries of a file written by `save_table`, if it was written under the same versions.

    Raises:
        ValueError: for a file that holds anything else.
    """
    table().update({key: Form(form) for key, form in read_choices(Path(path), FORMS).items()})
    _chosen.clear()
