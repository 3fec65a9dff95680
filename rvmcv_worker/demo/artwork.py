"""What is printed on cans and labels: bands, waves, badges and lines that look like text."""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
#: (down, around) -> RGB. `down` runs from 0 to 1 over the printed area, `around` is the angle in
#: radians, 0 towards the viewer; both (h, w). The colours are (h, w, 3) in 0..1.
Artwork = Callable[[Array, Array], Array]


def colour(rng: np.random.Generator, *, saturation: tuple[float, float], value: tuple[float, float]) -> Array:
    """A colour of any hue, RGB in 0..1, shape (3,)."""
    hsv = rng.uniform(), rng.uniform(*saturation), rng.uniform(*value)
    return np.array(colorsys.hsv_to_rgb(*hsv), np.float32)


def blend(under: Array, over: Array, opacity: Array) -> Array:
    """`over` on `under`; `opacity` lacks the colour axis."""
    return under + (over - under) * opacity[..., None]


def artwork(rng: np.random.Generator) -> Artwork:
    """One design, drawn by the dice: a ground, one large motif, a badge or not, lines of text or not."""
    ground = colour(rng, saturation=(0.0, 1.0), value=(0.25, 1.0))
    ink = colour(rng, saturation=(0.3, 1.0), value=(0.1, 1.0))
    bright = np.float32(rng.uniform(0.85, 1.0)) * np.ones(3, np.float32)
    motif = rng.choice(["bands", "diagonal", "wave", "panel", "fade"])
    phase, count = rng.uniform(0, 2 * np.pi), int(rng.integers(2, 5))
    split, slope = rng.uniform(0.3, 0.7), rng.uniform(0.1, 0.35) * rng.choice([-1, 1])
    badge_at, badge_radius = (rng.uniform(0.2, 0.5), rng.uniform(-0.6, 0.6)), rng.uniform(0.12, 0.26)
    has_badge, has_text = rng.random() < 0.6, rng.random() < 0.7
    letters = rng.random((7, 48)) < 0.62
    text_rows = rng.uniform(0.55, 0.7), rng.uniform(0.8, 0.95)

    def paint(down: Array, around: Array) -> Array:
        if motif == "bands":
            ink_on = np.cos(down * 2 * np.pi * count + phase) > 0.35
        elif motif == "diagonal":
            ink_on = np.sin((down + slope * around) * 2 * np.pi * (count - 1) + phase) > 0.2
        elif motif == "wave":
            ink_on = down > split + slope * 0.5 * np.sin(around * count + phase)
        elif motif == "panel":
            ink_on = np.cos(around * 2 + phase) > 0.3
        else:
            ink_on = down.clip(0, 1)
        rgb = blend(np.broadcast_to(ground, (*down.shape, 3)), ink, ink_on.astype(np.float32))
        if has_badge:
            away = np.hypot((down - badge_at[0]) * 1.3, (around - badge_at[1]) * 0.42)
            rgb = blend(rgb, bright, (away < badge_radius).astype(np.float32))
            rgb = blend(rgb, ink * 0.8, (away < badge_radius * 0.72).astype(np.float32))
        if has_text:
            row = (down - text_rows[0]) / (text_rows[1] - text_rows[0]) * 5
            column = ((around + np.pi) / (2 * np.pi) * 48).astype(int) % 48
            inside = (row > 0) & (row < 5) & (row % 1 > 0.35)
            rgb = blend(rgb, bright, (inside & letters[row.astype(int) % 7, column]).astype(np.float32))
        return rgb

    return paint
