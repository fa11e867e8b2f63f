"""Compressing from a command line: the options as text, the student and its report as files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kegfast.check import expected
from kegfast.compression.compress import compress
from kegfast.compression.ranks import RankRule, RankRules, check_rule
from kegfast.compression.report import CompressionReport
from kegfast.compression.saving import save
from kegfast.files import write_json


def compress_to_file(
    model: nn.Module,
    output: str | Path,
    *,
    rank: str | None = None,
    budget: str | None = None,
    example: str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    calibration: Any = None,
    samples: int = 256,
    measure: bool = True,
    round_to: int | None = None,
    factory: str | None = None,
) -> tuple[nn.Module, CompressionReport]:
    """Compresses a model as text options say; writes it, and its report beside it (`.report.json`).

    Args:
        model: the model with its weights.
        output: the safetensors file to write.
        rank: see `parse_rank`; "evbmf" without a budget.
        budget: see `parse_budget`.
        example: see `parse_example`.
        include, exclude: glob patterns of layer names.
        calibration, samples, measure, round_to: as in `compress`.
        factory: import path of the model, kept in the file.

    Returns:
        The student and the report.

    Raises:
        ValueError: an option that cannot be read, or as in `compress`.
        OSError: the files cannot be written.
    """
    output = Path(output)
    student, report = compress(
        model.eval(),
        "evbmf" if rank is None else parse_rank(rank),
        budget=None if budget is None else parse_budget(budget),
        example_input=None if example is None else parse_example(example),
        include=include or None,
        exclude=exclude or None,
        calibration=calibration,
        samples=samples,
        measure=measure,
        round_to=round_to,
    )
    save(student, output, factory=factory)
    write_json(output.with_suffix(".report.json"), report.to_dict())
    return student, report


def parse_rank(text: str) -> RankRules:
    """A rule as text: "evbmf", "0.5", "energy=0.9", "8,16", or "name:rule;name:rule" per layer."""
    if ":" in text:
        pairs = [part.rpartition(":") for part in text.split(";") if part.strip()]
        return {name.strip(): _rule(rule) for name, _, rule in pairs}
    return _rule(text)


def _rule(text: str) -> RankRule:
    text = text.strip()
    try:
        if "," in text:
            sides = [None if s.strip() in ("-", "none") else int(s) for s in text.split(",")]
            rule: RankRule = tuple(sides)
        else:
            rule = float(text)
    except ValueError:
        rule = text
    check_rule(rule)
    return rule


def parse_budget(text: str) -> dict[str, float]:
    """A budget as text: "params=0.4", "flops=0.5", "latency=0.7" or "memory=0.5"."""
    kind, _, value = text.partition("=")
    try:
        return {kind.strip(): float(value)}
    except ValueError as error:
        raise ValueError(expected("budget", "like params=0.4", text)) from error


def parse_example(text: str) -> Tensor:
    """A random input of the shape "1,3,224,224"."""
    try:
        shape = [int(size) for size in text.split(",")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1:
        raise ValueError(expected("example", "a shape like 1,3,224,224", text))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
