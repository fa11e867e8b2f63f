"""How sure a percentage is."""

import math


def binomial_interval(percent: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share that was counted.

    Args:
        percent: of `n`.
        n: how many were looked at.
        z: half its width in standard deviations of a normal distribution; 1.96 for 19 times in 20.

    Returns:
        Its ends in percent.
    """
    p = percent / 100
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)
