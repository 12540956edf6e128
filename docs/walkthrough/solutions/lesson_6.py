"""Solutions of lesson 6."""

from atedm import parse_preset
from minisdxl.config import SDXL_BASE
from minisdxl.cost import summary


def exercise_6_1(n: int, C: int) -> int:
    """Four products (n x C)(C x C), then (n x C)(C x n) and (n x n)(n x C)."""
    return 4 * 2 * n * C * C + 2 * 2 * n * n * C


def exercise_6_2(early_flops: float, later_flops: float, early: int, steps: int) -> float:
    """Each kind of step counts as often as it occurs."""
    return (early * early_flops + (steps - early) * later_flops) / steps


def average(hundredths: int) -> float:
    """FLOPs of an average call of `at-edm` at 1024 px."""
    schedule = parse_preset(f"at-edm:rho={hundredths / 100}")
    return float(summary(SDXL_BASE, 128, 128, schedule, 50)["average"])


exercise_6_3 = next(rho for rho in range(50, 100) if average(rho) <= 4.1e12) / 100
