"""The cells of bench_cuda: each verifies its contenders, then times them, on one CUDA device."""

import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tucker2_shapes import Shape
from kegfast import autotune, backend, functional
from kegfast.dispatch import cuda
from kegfast.models import LeNet5
from kegfast.nn import TuckerConv2d
from kegfast.ops import reference

Row = dict[str, object]
Run = Callable[[], object]


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def verified(errors: dict[str, float], limit: float) -> dict[str, float]:
    wrong = {name: value for name, value in errors.items() if not value < limit}
    if wrong:
        raise AssertionError(f"wrong results, relative errors: {wrong}")
    return errors


def sets_beyond_l2(bytes_per_set: int) -> int:
    """Input sets that together are three times as large as the L2 cache."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, math.ceil(3 * l2 / max(bytes_per_set, 1))))


def rotating(run: Callable[[int], object], sets: int) -> Run:
    """Each call takes the next set of inputs."""
    turn = itertools.cycle(range(sets))
    return lambda: run(next(turn))


def ceilings() -> Row:
    """Bytes a second of a large copy, FLOP a second of large products."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    copy = cuda.measure({"copy": lambda: b.copy_(a)}, rounds=5)["copy"]["graph"]
    found: Row = {"copy_bytes_per_s": 2 * a.numel() / copy * 1e3}
    for dtype in (torch.bfloat16, torch.float32):
        x, y = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
        ms = cuda.measure({"product": lambda x=x, y=y: x @ y}, rounds=5)["product"]["graph"]
        found[f"{str(dtype).removeprefix('torch.')}_flop_per_s"] = 2 * 8192**3 / ms * 1e3
    return found


# ---- diversity


def eager_exponent(noises: Tensor, samples: Tensor) -> Tensor:
    return reference.diversity_exponent(noises, samples, "l1", "sqeuclidean")


def cdist_exponent(noises: Tensor, samples: Tensor) -> Tensor:
    weights = torch.cdist(noises, noises).square() / noises.shape[1]
    return -(weights * torch.cdist(samples, samples, p=1) / samples.shape[1]).mean()


def diversity(batch: int, rivals: Sequence[str], features: int = 3072) -> Row:
    """Forward and gradient of the l1 loss; rivals: "eager", "cdist", "torch.compile"."""
    sets = sets_beyond_l2(8 * batch * features)
    noises = [torch.randn(batch, 10, device="cuda") for _ in range(sets)]
    samples = [torch.randn(batch, features, device="cuda", requires_grad=True) for _ in range(sets)]

    def autograd(exponent: Callable[[Tensor, Tensor], Tensor]) -> Callable[[int], tuple[Tensor, ...]]:
        return lambda i: torch.autograd.grad(exponent(noises[i], samples[i]), samples[i])

    def operator(i: int) -> tuple[Tensor, ...]:
        return torch.ops.kegfast.diversity_forward(noises[i], samples[i].detach(), 0, 0, False, True)[2:]

    runs = {
        "kegfast": operator,
        "kegfast autograd": autograd(lambda z, x: functional.diversity_loss(z, x, log=True)),
        "eager": autograd(eager_exponent),
        "cdist": autograd(cdist_exponent),
        "torch.compile": autograd(torch.compile(eager_exponent, mode="max-autotune-no-cudagraphs")),
    }
    chosen = {name: run for name, run in runs.items() if name in rivals or name.startswith("kegfast")}
    errors = {}
    for name, run in chosen.items():
        errors[name] = error(run(0)[0][:64], rows_by_definition(noises[0], samples[0].detach(), 64))
    times = cuda.measure(
        {name: rotating(run, sets) for name, run in chosen.items()},
        turn_ms=20,
        graphs=("kegfast",),  # the others allocate in their backward passes
    )
    return {
        "operator": "diversity l1",
        "batch": batch,
        "features": features,
        "sets": sets,
        "errors": verified(errors, 1e-4),
        "times": times,
        "bytes": 2 * samples[0].numel() * 4,
    }


def rows_by_definition(noises: Tensor, samples: Tensor, count: int) -> Tensor:
    """The gradient of the first rows, pair by pair in float64."""
    z, x = noises.double(), samples.double()
    weights = torch.cdist(z[:count], z).square() / z.shape[1]
    rows = [-2 * (w[:, None] * (x[i] - x).sign()).sum(0) for i, w in enumerate(weights)]
    return torch.stack(rows) / (len(x) ** 2 * x.shape[1])


def other_diversity(metric: str, batch: int, features: int = 3072) -> Row:
    """Forward and gradient of another metric against torch's own low-rank or cdist form."""
    sets = sets_beyond_l2(8 * batch * features)
    noises = [torch.randn(batch, 10, device="cuda") for _ in range(sets)]
    samples = [torch.randn(batch, features, device="cuda", requires_grad=True) for _ in range(sets)]

    def ours(i: int) -> tuple[Tensor, ...]:
        value = functional.diversity_loss(noises[i], samples[i], metric=metric, log=True)
        return torch.autograd.grad(value, samples[i])

    def cdist(i: int) -> tuple[Tensor, ...]:
        x = F.normalize(samples[i]) if metric == "cosine" else samples[i]
        unit = 0.5 if metric == "cosine" else 1 / features
        weights = torch.cdist(noises[i], noises[i]).square() / noises[i].shape[1]
        value = -(weights * torch.cdist(x, x).square() * unit).mean()
        return torch.autograd.grad(value, samples[i])

    contenders = {"kegfast autograd": ours, "cdist": cdist}
    return {
        "operator": f"diversity {metric}",
        "batch": batch,
        "features": features,
        "errors": verified({"kegfast autograd": error(ours(0)[0], cdist(0)[0])}, 1e-2),
        "times": cuda.measure(
            {name: rotating(run, sets) for name, run in contenders.items()}, turn_ms=20, graphs=()
        ),
        "bytes": 2 * samples[0].numel() * 4,
    }


# ---- tucker2

PROBE = """
import sys, torch
from benchmarks import cuda_cells
for name in sys.argv[1:]:
    cuda_cells.probe(name)
    torch.cuda.synchronize()
    print(name, flush=True)
"""


def broken_forms(program: Sequence[str] = (sys.executable, "-c", PROBE), seconds: float = 40) -> list[str]:
    """The compiled forms that fail or hang on this device.

    Each is tried in another process: a kernel that does what it may not takes its process's device away.
    """
    left, broken = [name for name, number in cuda.FORMS.items() if number is not None], []
    while left:
        try:
            done = subprocess.run([*program, *left], stdout=subprocess.PIPE, text=True, timeout=seconds)
            right = done.stdout.split()
        except subprocess.TimeoutExpired as hung:
            right = (hung.stdout or b"").decode().split()
        left = [name for name in left if name not in right]
        broken += left[:1]
        left = left[1:]
    return broken


def probe(form: str) -> None:
    """One call of a form on a small layer, its result checked."""
    torch.manual_seed(0)
    layer = TuckerConv2d(64, 64, 3, (16, 16), padding=1, bias=False).cuda().bfloat16()
    layer = layer.to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, 20, 20, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    weights = layer.first.weight, layer.core.weight, layer.last.weight
    with torch.no_grad():
        y = torch.ops.kegfast.tucker2_as(x, *weights, None, 1, 1, 1, 1, 1, 1, False, cuda.FORMS[form])
        exact = (t.double() for t in (x, *weights))
        want = reference.tucker_conv2d(*exact, None, (1, 1), (1, 1), (1, 1), None)
    verified({form: error(y, want)}, 2e-2)


def layers(shape: Shape, dtype: torch.dtype) -> dict[str, tuple[TuckerConv2d, nn.Conv2d]]:
    """The layer and the dense convolution that it stands for, by memory layout."""
    layer = TuckerConv2d(
        shape.channels, shape.features, shape.kernel, shape.ranks, shape.stride, shape.padding, bias=False
    )
    dense = layer.to_conv()
    found = {}
    for name, layout in (("nchw", torch.contiguous_format), ("channels_last", torch.channels_last)):
        copy = TuckerConv2d(
            shape.channels, shape.features, shape.kernel, shape.ranks, shape.stride, shape.padding, bias=False
        )
        copy.load_state_dict(layer.state_dict())
        conv = nn.Conv2d(
            shape.channels, shape.features, shape.kernel, shape.stride, shape.padding, bias=False
        )
        conv.load_state_dict(dense.state_dict())
        found[name] = tuple(m.cuda().to(dtype).to(memory_format=layout).eval() for m in (copy, conv))
    return found


def tucker2(shape: Shape, batch: int, dtype: torch.dtype, compiled: bool = False) -> Row:
    """Inference by the layer as a user calls it, by each form, and by cuDNN in each layout."""
    size = batch * (shape.channels * shape.size**2 + shape.features * (shape.size // shape.stride) ** 2)
    sets = sets_beyond_l2(size * dtype.itemsize)
    inputs = {"nchw": [], "channels_last": []}
    for _ in range(sets):
        x = torch.randn(batch, shape.channels, shape.size, shape.size, device="cuda", dtype=dtype)
        inputs["nchw"].append(x)
        inputs["channels_last"].append(x.contiguous(memory_format=torch.channels_last))
    models = layers(shape, dtype)
    layer = models["channels_last"][0]
    weights = layer.first.weight, layer.core.weight, layer.last.weight
    geometry = layer.core.stride, layer.core.padding, layer.core.dilation
    ints = [n for pair in geometry for n in pair]
    with torch.inference_mode():
        tuned = {name: autotune(m[0], inputs[name][0]) for name, m in models.items()}

    def on(name: str, module: Callable[[Tensor], Tensor]) -> Callable[[int], Tensor]:
        return lambda i: module(inputs[name][i])

    contenders = {
        "kegfast": on("channels_last", layer),
        "kegfast nchw": on("nchw", models["nchw"][0]),
        "cudnn": on("nchw", models["nchw"][0].to_sequential()),
        "cudnn channels_last": on("channels_last", layer.to_sequential()),
        "dense": on("nchw", models["nchw"][1]),
        "dense channels_last": on("channels_last", models["channels_last"][1]),
    }
    for form, number in cuda.FORMS.items():
        if number is not None:
            contenders[f"kegfast {form}"] = lambda i, n=number: torch.ops.kegfast.tucker2_as(
                inputs["channels_last"][i], *weights, None, *ints, False, n
            )
    if compiled:
        contenders["torch.compile"] = on(
            "channels_last", torch.compile(layer.to_sequential(), mode="max-autotune-no-cudagraphs")
        )
    x = inputs["nchw"][0]
    want = reference.tucker_conv2d(x.double(), *(w.double() for w in weights), None, *geometry, None)
    with torch.inference_mode():
        errors = {name: error(run(0), want) for name, run in contenders.items()}
        times = cuda.measure({name: rotating(run, sets) for name, run in contenders.items()})
    return {
        "operator": "tucker2",
        "shape": shape.name,
        "family": shape.family,
        "share": shape.channels // shape.ranks[0],
        "batch": batch,
        "dtype": str(dtype),
        "sets": sets,
        "errors": verified(errors, 2e-2 if dtype != torch.float32 else 4e-3),
        "times": times,
        "chosen": {name: cuda.fastest(*times.values()) for name, times in tuned.items()},
        "bytes": size * dtype.itemsize,
        "flop": 2 * shape.multiply_adds(batch),
    }


def tucker2_training(shape: Shape, batch: int, dtype: torch.dtype) -> Row:
    """Forward and backward of the layer against its three convolutions, channels_last."""
    layer, _ = layers(shape, dtype)["channels_last"]
    sequence = layer.to_sequential()
    x = torch.randn(batch, shape.channels, shape.size, shape.size, device="cuda", dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    autotune(layer, x.detach(), training=True)
    wanted = [x, *layer.parameters()]
    grad = torch.ones_like(sequence(x))

    def native() -> tuple[Tensor, ...]:
        with backend("native"):
            return torch.autograd.grad(layer(x), wanted, grad)

    contenders = {
        "kegfast": lambda: torch.autograd.grad(layer(x), wanted, grad),
        "kegfast native": native,
        "cudnn channels_last": lambda: torch.autograd.grad(sequence(x), wanted, grad),
    }
    want = contenders["cudnn channels_last"]()
    errors = {
        name: max(error(a, b) for a, b in zip(run(), want, strict=True)) for name, run in contenders.items()
    }
    return {
        "operator": "tucker2 training",
        "shape": shape.name,
        "batch": batch,
        "dtype": str(dtype),
        "errors": verified(errors, 5e-2),
        "times": cuda.measure(contenders),
    }


# ---- soft targets and a whole step


def soft_target(batch: int, classes: int, dtype: torch.dtype = torch.float32) -> Row:
    """Loss and gradient against torch's own operators, eager and compiled."""
    sets = sets_beyond_l2(3 * batch * classes * dtype.itemsize)
    students = [torch.randn(batch, classes, device="cuda", dtype=dtype).requires_grad_() for _ in range(sets)]
    teachers = [torch.randn(batch, classes, device="cuda", dtype=dtype) for _ in range(sets)]

    def run(loss: Callable[..., Tensor]) -> Callable[[int], tuple[Tensor, ...]]:
        return lambda i: torch.autograd.grad(loss(students[i], teachers[i], 4.0), students[i])

    contenders = {"kegfast": run(functional.soft_target), "eager": run(reference.soft_target)}
    want = reference.soft_target_gradient(students[0].detach().double(), teachers[0].double(), 4.0)
    errors = {name: error(contender(0)[0], want) for name, contender in contenders.items()}
    return {
        "operator": "soft_target",
        "batch": batch,
        "classes": classes,
        "dtype": str(dtype),
        "errors": verified(errors, 1e-2),
        "times": cuda.measure({name: rotating(r, sets) for name, r in contenders.items()}, turn_ms=5),
        "bytes": 3 * batch * classes * dtype.itemsize,
    }


def emulated_soft_target() -> Row:
    """Loss and gradient on the tests' emulator: no time of any device."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from cuda_emulator import Emulator, compile_emulator

    built = os.environ.get("KEGFAST_EMULATOR")
    device = Emulator(Path(built) if built else compile_emulator(Path(tempfile.mkdtemp())))
    student, teacher = torch.randn(2, 3, 10)
    loss, _ = device.soft_target(student, teacher, 4.0, "ascending")
    begin = time.perf_counter()
    device.soft_target(student, teacher, 4.0, "ascending")
    milliseconds = (time.perf_counter() - begin) * 1e3
    return {
        "operator": "soft_target, emulated",
        "errors": verified({"kegfast": error(loss, reference.soft_target(student, teacher, 4.0))}, 1e-5),
        "times": {"kegfast": {"eager": milliseconds}},
    }


def generator_step(batch: int = 256) -> Row:
    """The paper's generator step: a LeNet5 judges samples; cross entropy and diversity; eager and graph."""
    teacher = LeNet5().cuda().eval()
    make = nn.Sequential(nn.Linear(20, 1024), nn.Tanh()).cuda()
    z = torch.randn(batch, 10, device="cuda")
    labels = torch.randint(0, 10, (batch,), device="cuda")
    inputs = torch.cat([F.one_hot(labels, 10).float(), z], 1)

    def step(exponent: Callable[[Tensor, Tensor], Tensor]) -> Run:
        def run() -> tuple[Tensor, ...]:
            samples = make(inputs).view(batch, 1, 32, 32)
            loss = F.cross_entropy(teacher(samples), labels) + exponent(z, samples.flatten(1)).exp()
            return torch.autograd.grad(loss, list(make.parameters()))

        return run

    contenders = {
        "kegfast": step(lambda noises, samples: functional.diversity_loss(noises, samples, log=True)),
        "eager": step(eager_exponent),
    }
    errors = {
        "kegfast": max(
            error(a, b) for a, b in zip(contenders["kegfast"](), contenders["eager"](), strict=True)
        )
    }
    return {
        "operator": "generator step",
        "batch": batch,
        "errors": verified(errors, 1e-3),
        "times": cuda.measure(contenders, graphs=("kegfast",)),
    }
