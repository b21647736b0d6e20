"""Where the labels of a picture's marks find room."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from axes import BOTTOM, LEFT, RIGHT, TOP

SIZE = 11.5  # of the letters
LETTER = 0.61 * SIZE  # the mean advance of a letter of the widest of the fonts (DejaVu Sans)
BOLD = 0.68 * SIZE
R = 5.5  # of a mark


@dataclass(frozen=True)
class Box:
    x0: float
    y0: float
    x1: float
    y1: float

    def meets(self, other: Box) -> bool:
        across = self.x0 < other.x1 and other.x0 < self.x1
        return across and self.y0 < other.y1 and other.y0 < self.y1

    def inside(self, other: Box) -> bool:
        across = other.x0 <= self.x0 and self.x1 <= other.x1
        return across and other.y0 <= self.y0 and self.y1 <= other.y1


PLOT = Box(LEFT + 3, TOP + 3, RIGHT - 3, BOTTOM - 3)


def label_box(x: float, y: float, width: float, step: float, angle: float) -> Box:
    """Where a label lies that is `step` away from the mark at (x, y), in the direction `angle`."""
    height = SIZE + 2
    dx, dy = math.cos(angle), -math.sin(angle)
    cx = x + dx * step + _toward(dx) * width / 2
    cy = y + dy * step + _toward(dy) * height / 2
    return Box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)


def _toward(direction: float) -> float:
    """-1, 0 or 1: which side of a label faces the mark."""
    return 0.0 if abs(direction) < 0.3 else math.copysign(1.0, direction)


ANGLES = [math.radians(each) for each in (0, 180, 30, -30, 150, -150, 90, -90, 60, -60, 120, -120)]
STEPS = (R + 4, R + 12, R + 22, R + 34, R + 48, R + 64, R + 84, R + 110, R + 140, R + 180)


def place(marks: Sequence[tuple[float, float, float]]) -> list[Box | None]:
    """A box for the label of every mark (x, y, width), near it, over no mark and no other label;
    None where there is no room. Earlier marks choose first."""
    taken = [Box(x - R, y - R, x + R, y + R) for x, y, _ in marks]
    found: list[Box | None] = []
    for x, y, width in marks:
        boxes = (label_box(x, y, width, step, angle) for step in STEPS for angle in ANGLES)
        box = next((b for b in boxes if b.inside(PLOT) and not any(map(b.meets, taken))), None)
        found.append(box)
        if box:
            taken.append(box)
    return found
