"""What is behind the objects, and the light that falls on all of it.

Pictures are float32 RGB in 0..1, shape (size, size, 3).
"""

from __future__ import annotations

import cv2
import numpy as np

from rvmcv_worker.demo.artwork import Array, colour


def noise(rng: np.random.Generator, shape: tuple[int, ...], cells: int) -> Array:
    """Smooth noise of about -1..1 in this shape (h, w): `cells` random values a side, interpolated."""
    coarse = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    smooth: Array = cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC)
    return smooth


def background(rng: np.random.Generator, size_px: int) -> Array:
    """A plain wall, shelf, conveyor belt, tiles, wood, or the dark chamber of a vending machine."""
    y, x = (np.mgrid[0:size_px, 0:size_px] / np.float32(size_px)).astype(np.float32)
    tone = colour(rng, saturation=(0.0, 0.35), value=(0.35, 0.95))
    turn = rng.uniform(-0.25, 0.25)
    along, across = x + turn * y, y - turn * x
    grain = 1 + 0.05 * noise(rng, x.shape, 6)
    kind = rng.choice(["wall", "shelf", "belt", "tiles", "wood", "chamber", "mess"])
    if kind == "shelf":
        boards = np.abs((across * rng.uniform(1.2, 2.5) + rng.uniform()) % 1 - 0.5)
        grain = grain * (1 - 0.5 * (boards < 0.04) - 0.25 * ((boards >= 0.04) & (boards < 0.1)))
    elif kind == "belt":
        tone = tone * np.float32(0.45)
        lines = (along * rng.uniform(5, 12)) % 1
        rail = np.abs(across - 0.5) > rng.uniform(0.36, 0.48)
        grain = grain * (1 - 0.3 * (lines < 0.07)) * (1 + 0.9 * rail)
    elif kind == "tiles":
        step = rng.uniform(3, 7)
        joint = ((along * step) % 1 < 0.05) | ((across * step) % 1 < 0.05)
        grain = grain * (1 - rng.uniform(-0.25, 0.35) * joint)
    elif kind == "wood":
        rings = np.sin((across * rng.uniform(15, 30) + noise(rng, x.shape, 4)) * 2)
        tone = np.array([0.62, 0.43, 0.26], np.float32) * np.float32(rng.uniform(0.6, 1.3))
        grain = grain * (1 + 0.07 * rings)
    elif kind == "chamber":
        away = np.hypot(x - 0.5, y - rng.uniform(0.2, 0.6))
        tone = tone * np.float32(0.5)
        grain = grain * (1.5 - 1.3 * away)
    elif kind == "mess":
        grain = grain * (1 + 0.25 * noise(rng, x.shape, int(rng.integers(8, 24))))
    grain = grain * (1 + rng.uniform(-0.25, 0.25) * (y - 0.5) * 2)
    picture: Array = (tone * grain[..., None]).clip(0, 1).astype(np.float32)
    return picture


def relight(rng: np.random.Generator, picture: Array) -> Array:
    """The camera's part: brightness, light from one side, a hard shadow, a colour cast, blur, grain."""
    size_px = len(picture)
    y, x = (np.mgrid[0:size_px, 0:size_px] / np.float32(size_px) - 0.5).astype(np.float32)
    towards = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(towards) + y * np.sin(towards)
    field = rng.uniform(0.85, 1.2) * (1 + rng.uniform(0, 0.5) * along)
    if rng.random() < 0.25:
        edge = rng.uniform(-0.3, 0.3)
        field = field * (1 - rng.uniform(0.15, 0.4) / (1 + np.exp((along - edge) * 60)))
    cast = (1 + rng.uniform(-0.08, 0.08, 3)).astype(np.float32)
    picture = (picture * field[..., None] * cast).astype(np.float32)
    if rng.random() < 0.3:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, 1.1) * size_px / 320).astype(np.float32)
    grain = rng.uniform(0.003, 0.02) * rng.standard_normal(picture.shape, np.float32)
    lit: Array = (picture + grain).clip(0, 1)
    return lit
