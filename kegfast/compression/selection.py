"""Which layers of a model a call to compress means."""

from collections.abc import Iterable, Mapping, Sequence, Set
from fnmatch import fnmatchcase
from typing import Any

from kegfast._util.check import expected
from kegfast.compression.surgery import Site
from kegfast.decomposition import ranks
from kegfast.decomposition.ranks import RankRules

Patterns = str | Sequence[str] | None


def select(
    sites: list[Site],
    include: Patterns,
    exclude: Patterns,
    rules: RankRules | None = None,
    *,
    rest: bool = True,
) -> list[Site]:
    """The sites that the patterns choose and that can be factored; notes why the others are not.

    Args:
        sites: all layers of the model.
        include, exclude, rules: as of `compress`.
        rest: whether layers that no rule names are chosen too.
    """
    taken, left = _patterns("include", include), _patterns("exclude", exclude)
    if taken == []:
        raise ValueError(expected("include", "one glob pattern at least, or None for all layers", include))
    for argument, patterns in (("include", taken or []), ("exclude", left or [])):
        _check_matches(argument, patterns, sites)
    if isinstance(rules, Mapping):
        if not all(isinstance(name, str) for name in rules):
            raise TypeError(expected("rank", "a mapping from names or glob patterns of layers", rules))
        _check_matches("rank", rules, sites)
        for rule in rules.values():
            ranks.check_rule(rule)
    elif rules is not None:
        ranks.check_rule(rules)
    selected = []
    for site in sites:
        if taken is not None and not _matches(site, taken):
            site.refusal = "not in include"
        elif left is not None and _matches(site, left):
            site.refusal = "in exclude"
        elif site.refusal is None and not rest and rule_of(site, rules) is None:
            site.refusal = "no rank given"
        if site.refusal is None:
            if not bool(site.layer.weight.isfinite().all()):
                raise ValueError(f"model must have finite weights, got NaN or inf in {site.name!r}")
            selected.append(site)
    return selected


def _patterns(argument: str, patterns: Patterns) -> list[str] | None:
    if patterns is None:
        return None
    found = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(found, Sequence | Set) or not all(isinstance(pattern, str) for pattern in found):
        raise TypeError(expected(argument, "glob patterns of layer names", patterns))
    return list(found)


def _check_matches(argument: str, patterns: Iterable[str], sites: list[Site]) -> None:
    for pattern in patterns:
        if not any(_matches(site, [pattern]) for site in sites):
            known = ", ".join(site.name for site in sites[:8])
            raise ValueError(f"{argument} must match a layer ({known}, ...), got {pattern!r}")


def _matches(site: Site, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in site.names for pattern in patterns)


def rule_of(site: Site, rules: RankRules | None) -> Any:
    """The rule of a layer under any of its names; None where no rule names it."""
    if rules is None:
        return None
    found = (ranks.rule_for(rules, name) for name in site.names)
    return next((rule for rule in found if rule is not None), None)
