"""Which form a Tucker-2 layer takes on a CUDA device: measured where `autotune` has run, else calculated."""

import json
import logging
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kegfast import reference
from kegfast.check import expected
from kegfast.files import write_json

Form = Literal["fused", "stages", "convolutions"]
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # stride, padding, dilation
FORMS: dict[Form, int | None] = {"fused": 1, "stages": 2, "convolutions": None}
"""The forms by their number in `torch.ops.kegfast.tucker2_as`."""

_log = logging.getLogger(__name__)
_measured: dict[str, Form] = {}
_tf32: bool | None = None


def takes(x: Tensor, first: Tensor, core: Tensor, last: Tensor, geometry: Geometry) -> bool:
    """Whether the compiled operator takes this call on x's CUDA device; else torch's convolutions do."""
    if torch.compiler.is_compiling():  # the shapes may be symbols; the operator chooses by itself
        return True
    _follow_tf32()
    if _measured:
        form = _measured.get(_key(x, first, core, last, geometry))
        if form is not None:
            return form != "convolutions"
    return expected_gain(x, first, core, last, geometry) >= 1


def _follow_tf32() -> None:
    """Tells the library whether float32 may be rounded to TF32, as torch's convolutions are told."""
    global _tf32
    if torch.backends.cudnn.allow_tf32 != _tf32:
        _tf32 = torch.backends.cudnn.allow_tf32
        torch.ops.kegfast.cuda_allow_tf32(_tf32)


def expected_gain(
    x: Tensor,  # (N, C, H, W)
    first: Tensor,  # (R1, C, 1, 1)
    core: Tensor,  # (R2, R1, kh, kw)
    last: Tensor,  # (K, R2, 1, 1)
    geometry: Geometry,
) -> float:
    """Time of three convolutions over time of the fused kernel, by bytes and multiply-adds alone.

    Calculated for an H200 (4.8 TB/s; 990 TFLOP/s in 16 bits, of which mma.sync reaches 60 %), not
    measured. Launches, of which the fused form saves at least one, are left out.
    """
    multiply_adds_a_byte = (990e12 if x.dtype != torch.float32 else 495e12) / 2 / 4.8e12
    n, c, h, w = x.shape
    r2, r1, kh, kw = core.shape
    sizes = zip((h, w), (kh, kw), *geometry, strict=True)
    out_h, out_w = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)
    pixels, out, bytes_ = n * h * w, n * out_h * out_w, x.element_size()
    k = last.shape[0]
    stages = (
        (pixels * (c + r1), pixels * c * r1),
        (pixels * r1 + out * r2, out * r1 * r2 * kh * kw),
        (out * (r2 + k), out * r2 * k),
    )
    apart = sum(max(moved * bytes_, work / multiply_adds_a_byte) for moved, work in stages)
    work = sum(work for _, work in stages)
    return apart / max((pixels * c + out * k) * bytes_, work / (0.6 * multiply_adds_a_byte))


def _key(x: Tensor, first: Tensor, core: Tensor, last: Tensor, geometry: Geometry) -> str:
    layout = "nhwc" if x.stride(1) == 1 else "nchw"
    name = torch.cuda.get_device_name(x.device)
    shapes = " ".join("x".join(map(str, t.shape)) for t in (x, first, core, last))
    return f"{name} | {x.dtype} {layout} | {shapes} | {geometry}"


def autotune(model: torch.nn.Module, example_input: Tensor) -> dict[str, dict[Form, float]]:
    """Measures every form of the model's Tucker-2 layers on its device; later calls take the fastest.

    Args:
        model: a module with `kegfast.nn.TuckerConv2d` layers, on a CUDA device, in evaluation mode.
        example_input: what the model is called with, of the batch size to tune for.

    Returns:
        Per layer shape, milliseconds per form (medians, interleaved).

    Raises:
        ValueError: where example_input is not on a CUDA device.
    """
    if not example_input.is_cuda:
        raise ValueError(expected("example_input", "on a CUDA device", example_input))
    _follow_tf32()
    times = {}
    with torch.inference_mode():
        for key, arguments in _calls(model, example_input):
            if key not in times:
                times[key] = measure({form: _runner(form, arguments) for form in FORMS})
                _measured[key] = min(times[key], key=times[key].__getitem__)
                _log.info("%s: %s", key, times[key])
    return times


def _calls(model: torch.nn.Module, example_input: Tensor) -> Iterator[tuple[str, tuple]]:
    """The arguments of every Tucker-2 convolution in one forward pass."""
    from kegfast.nn import TuckerConv2d

    found = []

    def record(layer, inputs, _):
        weights = layer.first.weight, layer.core.weight, layer.last.weight
        geometry = layer.core.stride, layer.core.padding, layer.core.dilation
        arguments = (inputs[0], *weights, layer.last.bias, geometry, layer.activation)
        found.append((_key(inputs[0], *weights, geometry), arguments))

    layers = [module for module in model.modules() if isinstance(module, TuckerConv2d)]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        model(example_input)
    finally:
        for hook in hooks:
            hook.remove()
    yield from found


def _runner(form: Form, arguments: tuple) -> Callable[[], Tensor]:
    x, first, core, last, bias, geometry, activation = arguments
    number = FORMS[form]
    if number is None:
        return lambda: reference.tucker_conv2d(x, first, core, last, bias, *geometry, activation)
    ints = [n for pair in geometry for n in pair]
    call = torch.ops.kegfast.tucker2_as
    return lambda: call(x, first, core, last, bias, *ints, activation == "relu", number)


def measure(
    runners: dict[str, Callable[[], object]], rounds: int = 15, repeats: int = 20
) -> dict[str, float]:
    """Milliseconds per call: medians over interleaved rounds of CUDA-graph replays, `repeats` calls each."""
    graphs = {}
    for name, run in runners.items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for _ in range(repeats):
                run()
    samples: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) / repeats)
    return {name: statistics.median(values) for name, values in samples.items()}


def save_table(path: str | Path) -> None:
    """Writes what `autotune` has measured in this process as JSON."""
    write_json(path, _measured)


def load_table(path: str | Path) -> None:
    """Adds the entries of a file written by `save_table`.

    Raises:
        ValueError: for a file that holds anything else.
    """
    try:
        table = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(expected("path", "a table written by save_table", path)) from error
    if not isinstance(table, dict) or not all(form in FORMS for form in table.values()):
        raise ValueError(expected("path", "a table written by save_table", path))
    _measured.update(table)
