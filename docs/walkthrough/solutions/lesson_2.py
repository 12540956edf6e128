"""Solutions of lesson 2."""

import math

# The way up begins at level 2 with three blocks, 0 to 2. Level 1 follows with 3 to 5, and its second one is 4. In a
# numbered block the ResBlock is part 0 and attention is part 1.
exercise_2_1 = "output_blocks.4.1"

# Down: 2 blocks of 2 and 2 of 10. Middle: 10. Up: 3 of 10 and 3 of 2.
exercise_2_2 = 2 * 2 + 2 * 10 + 10 + 3 * 10 + 3 * 2


def exercise_2_3(level: int, width: int, height: int) -> int:
    """The VAE makes both sides 8 times shorter, each level halves them."""
    rows, columns = height // 8, width // 8
    for _ in range(level):
        rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
    return rows * columns
