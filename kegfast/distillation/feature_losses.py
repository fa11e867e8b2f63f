"""Losses on inner feature maps: hints, attention maps and the flow between two layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kegfast._util import check
from kegfast._util.check import expected
from kegfast.distillation.precision import wide, without_autocast


def hint(
    student: Tensor,  # (B, ...) features, after the regressor where one is needed
    teacher: Tensor,  # of the same shape
) -> Tensor:
    """Match a hint layer (FitNets: Romero et al. 2015, equation 3).

    `1/2 * mean((teacher - student)^2)` with the student's features sent through a regressor first
    where the shapes differ (`make_regressor`). The paper sums; the mean leaves the loss's weight
    independent of the layer's size.

    Returns:
        A scalar, in float32 or wider.

    Raises:
        TypeError, ValueError: No floating-point tensors, or of different shapes.
    """
    _same_shape(student, teacher)
    student = wide(student)
    return 0.5 * F.mse_loss(student, teacher.detach().to(student.dtype))


def make_regressor(
    student: Tensor,  # (B, C, H, W) or (B, D)
    teacher: Tensor,  # (B, C', H', W') or (B, D')
    kernel_size: int | None = None,
) -> nn.Module:
    """Create the layer that turns the student's features into the teacher's shape.

    A convolution for maps: 1x1 when the sizes agree (3x3 with padding when asked for), and an
    unpadded one of `H - H' + 1` by `W - W' + 1` when the student's map is larger, as in the FitNets
    paper (section 2.2). A linear layer for vectors.

    Args:
        student: One batch of the student's features.
        teacher: The teacher's features of the same samples.
        kernel_size: 1 or 3 for maps of equal size; 1 when None.

    Raises:
        TypeError, ValueError: The student's map is smaller, the ranks differ, or they are no features.
    """
    check.batches(student=student, teacher=teacher)
    if student.ndim != teacher.ndim or student.ndim not in (2, 4):
        what = "features of the student's rank, (B, D) or (B, C, H, W)"
        raise ValueError(expected("teacher", what, tuple(teacher.shape)))
    if kernel_size not in (None, 1, 3):
        raise ValueError(expected("kernel_size", "1, 3 or None", kernel_size))
    inputs, outputs = student.shape[1], teacher.shape[1]
    if student.ndim == 2:
        regressor: nn.Module = nn.Linear(inputs, outputs)
    else:
        excess = [s - t for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        if min(excess) < 0:
            what = f"a map no larger than the student's {tuple(student.shape[2:])}"
            raise ValueError(expected("teacher", what, tuple(teacher.shape[2:])))
        if max(excess) == 0:
            size = kernel_size or 1
            regressor = nn.Conv2d(inputs, outputs, size, padding=size // 2)
        else:
            regressor = nn.Conv2d(inputs, outputs, (excess[0] + 1, excess[1] + 1))
    return regressor.to(student.device)


def attention_map(
    features: Tensor,  # (B, C, H, W)
    power: float = 2.0,
) -> Tensor:
    """Where a layer looks: `sum_c |features_c|^power`, flattened and of unit norm, (B, H * W)."""
    check.batches(features=features)
    check.number("power", power, above=0)
    if features.ndim != 4:
        raise ValueError(expected("features", "shape (B, C, H, W)", tuple(features.shape)))
    return F.normalize(wide(features).abs().pow(power).sum(dim=1).flatten(1), dim=1)


def attention_transfer(
    student: Tensor,  # (B, C, H, W)
    teacher: Tensor,  # (B, C', H, W)
    *,
    power: float = 2.0,
) -> Tensor:
    """Match attention maps (Zagoruyko and Komodakis 2017, equation 2).

    The mean over batch and positions of `(Q(student) - Q(teacher))^2`, `Q` being `attention_map`. Sum
    over the pairs of layers and weight by about 1000, the paper's beta; this squared form is the one
    that weight belongs to. The numbers of channels may differ.

    Args:
        student: (B, C, H, W) features.
        teacher: (B, C', H, W) features.
        power: Of the features' magnitudes in a map, above 0; 2 is the paper's.

    Returns:
        A scalar, in float32 or wider.

    Raises:
        TypeError, ValueError: No floating-point tensors, or batch or map sizes that differ.
    """
    check.batches(student=student, teacher=teacher)
    if student.shape[:1] + student.shape[2:] != teacher.shape[:1] + teacher.shape[2:]:
        what = f"shape ({student.shape[0]}, any, {', '.join(map(str, student.shape[2:]))})"
        raise ValueError(expected("teacher", what, tuple(teacher.shape)))
    ours = attention_map(student, power)
    return F.mse_loss(ours, attention_map(teacher.detach(), power).to(ours.dtype))


def flow(
    first: Tensor,  # (B, C1, H, W)
    second: Tensor,  # (B, C2, H', W')
) -> Tensor:
    """Flow of the solution procedure: `sum_p first_ip second_jp / (H W)`, (B, C1, C2).

    The larger map is max-pooled to the smaller one's size, as in the paper (section 3.2).
    """
    check.batches(first=first, second=second)
    if first.ndim != 4 or second.ndim != 4 or first.shape[0] != second.shape[0]:
        what = f"shape (B, C, H, W) with the first layer's batch of {first.shape[0]}"
        raise ValueError(expected("second", what, tuple(second.shape)))
    size = tuple(map(min, first.shape[2:], second.shape[2:]))
    first, second = (F.adaptive_max_pool2d(wide(x), size).flatten(2) for x in (first, second))
    with without_autocast(first):
        return torch.bmm(first, second.mT) / first.shape[2]


def fsp(
    student: tuple[Tensor, Tensor],  # (B, C1, H, W), (B, C2, H', W')
    teacher: tuple[Tensor, Tensor],  # of the same channels
) -> Tensor:
    """Match the flow between two layers (Yim et al. 2017, equation 2).

    `mean_b ||flow(teacher)_b - flow(student)_b||_F^2`. Sum over the pairs of layers. The two
    layers need the teacher's numbers of channels; their map sizes are free.

    Returns:
        A scalar, in float32 or wider.

    Raises:
        TypeError, ValueError: No pairs of floating-point maps, or other numbers of channels.
    """
    for name, two in (("student", student), ("teacher", teacher)):
        if not isinstance(two, tuple | list) or len(two) != 2:
            raise TypeError(expected(name, "a pair of layers' features", two))
    ours = flow(*student)
    theirs = flow(*(x.detach() for x in teacher)).to(ours.dtype)
    if ours.shape != theirs.shape:
        channels = tuple(ours.shape[1:])
        raise ValueError(expected("teacher", f"layers of {channels} channels", theirs))
    return (ours - theirs).square().sum(dim=(1, 2)).mean()


def _same_shape(student: Tensor, teacher: Tensor) -> None:
    check.batches(student=student, teacher=teacher)
    if student.shape != teacher.shape:
        raise ValueError(expected("teacher", f"of shape {tuple(student.shape)}", tuple(teacher.shape)))
