"""Bottles and cans as solids of revolution.

Local coordinates have the object's height as unit: `v` runs from 0 at the top (cap, lid) to 1 at
the bottom, `u` from the axis to the right. A solid is its outline (radius over `v`) and its paint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rvmcv_worker.demo.artwork import Array, artwork, blend, colour

#: Class names in the order of their ids in the labels.
NAMES = ("bottle", "can")

#: RGB in 0..1: green, brown and blue-green glass; cola, orangeade, lemonade and water.
GLASS = ((0.1, 0.32, 0.14), (0.36, 0.19, 0.06), (0.12, 0.28, 0.2))
LIQUIDS = ((0.25, 0.1, 0.04), (0.95, 0.55, 0.1), (0.8, 0.85, 0.3), (0.7, 0.85, 0.95))

#: (v, angle) -> RGB (h, w, 3) and opacity (h, w).
Paint = Callable[[Array, Array], tuple[Array, Array]]
#: (x, y) on the lid's disc, both -1..1 -> RGB (h, w, 3).
LidPaint = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class Solid:
    """One object, before it is placed: 64 radii over `v`, its paint, and how its surface shines."""

    class_id: int
    radii: Array
    paint: Paint
    lid: LidPaint
    #: Height over width of a ring seen from slightly above.
    tilt: float
    #: Strength of the highlight, 0 (paper) to 1 (glass).
    gloss: float
    #: Amplitude of the axis' sideways bend and of dents in the surface; 0 for an unharmed object.
    crush: float
    crush_phase: float


def outline(*points: tuple[float, float]) -> Array:
    """64 radii at even `v`, S-curves between the given (v, radius) points."""
    at, radius = np.array(points).T
    v = np.linspace(0, 1, 64)
    i = np.clip(np.searchsorted(at, v, side="right") - 1, 0, len(at) - 2)
    t = np.clip((v - at[i]) / np.maximum(at[i + 1] - at[i], 1e-9), 0, 1)
    radii: Array = (radius[i] + (radius[i + 1] - radius[i]) * t * t * (3 - 2 * t)).astype(np.float32)
    return radii


def zone(v: Array, start: float, end: float) -> Array:
    """1 where start <= v < end, else 0."""
    return ((v >= start) & (v < end)).astype(np.float32)


def bottle(rng: np.random.Generator) -> Solid:
    """Clear or tinted PET, glass, or opaque HDPE; with cap, neck, shoulders, mostly with a label."""
    make = rng.choice(["clear", "tinted", "glass", "opaque"], p=[0.35, 0.25, 0.2, 0.2])
    body = rng.uniform(0.13, 0.165) if make != "opaque" else rng.uniform(0.15, 0.2)
    neck = rng.uniform(0.045, 0.06)
    cap_end = rng.uniform(0.06, 0.085)
    neck_end = rng.uniform(0.24, 0.36) if make == "glass" else cap_end + rng.uniform(0.02, 0.06)
    shoulder_end = neck_end + rng.uniform(0.1, 0.2)
    waist = rng.uniform(0.84, 1.0) if make in ("clear", "tinted") else 1.0
    radii = outline(
        (0, neck * 1.1), (cap_end, neck * 1.15), (cap_end + 0.012, neck * 0.92), (neck_end, neck),
        (shoulder_end, body), (0.62, body * waist), (0.78, body), (0.95, body), (1, body * 0.86),
    )  # fmt: skip
    glass = colour(rng, saturation=(0.55, 0.95), value=(0.25, 0.7))
    material = {
        "clear": np.array([0.86, 0.93, 0.95], np.float32) * np.float32(rng.uniform(0.9, 1.05)),
        "tinted": glass * 0.6 + 0.35,
        "glass": np.array(GLASS, np.float32)[rng.integers(len(GLASS))],
        "opaque": colour(rng, saturation=(0.0, 0.7), value=(0.7, 1.0)),
    }[str(make)]
    body_opacity = {"clear": 0.4, "tinted": 0.6, "glass": 0.85, "opaque": 1.0}[str(make)]
    cap = colour(rng, saturation=(0.0, 1.0), value=(0.3, 1.0))
    liquid = np.array(LIQUIDS, np.float32)[rng.integers(len(LIQUIDS))]
    level = rng.uniform(0.35, 0.9) if make in ("clear", "tinted") and rng.random() < 0.35 else 1.1
    ribs = rng.choice([0.0, 0.1]) if make in ("clear", "tinted") else 0.0
    label_start = rng.uniform(shoulder_end - 0.02, shoulder_end + 0.08)
    label_end = label_start + (rng.uniform(0.18, 0.34) if rng.random() < 0.85 else 0.0)
    design = artwork(rng)

    def paint(v: Array, angle: Array) -> tuple[Array, Array]:
        # Looking along the wall, at the edges, one sees more material than looking through it.
        edge = np.abs(np.sin(angle)) ** 4
        opacity = body_opacity + (1 - body_opacity) * 0.75 * edge
        rgb = material * (1 - 0.35 * edge[..., None]) + np.zeros((*v.shape, 3), np.float32)
        rgb *= (1 + ribs * np.sin(v * 2 * np.pi * 22) * zone(v, shoulder_end, 0.97))[..., None]
        full = zone(v, level, 0.985)
        rgb, opacity = blend(rgb, liquid, full * 0.85), np.maximum(opacity, full * 0.8)
        thread = zone(v, cap_end, cap_end + 0.02)
        opacity = np.maximum(opacity, thread * 0.7)
        on_label = zone(v, label_start, label_end)
        if label_end > label_start:
            rgb = blend(rgb, design((v - label_start) / (label_end - label_start), angle), on_label)
        on_cap = zone(v, -1, cap_end)
        ridged = cap * (1 + 0.16 * np.sign(np.sin(angle * 24)))[..., None]
        rgb = blend(rgb, ridged.astype(np.float32), on_cap)
        return rgb, np.maximum(opacity, np.maximum(on_label, on_cap))

    def lid(x: Array, _y: Array) -> Array:
        return np.broadcast_to(np.minimum(cap * 1.15 + 0.04, 1), (*x.shape, 3)).astype(np.float32)

    return Solid(
        class_id=NAMES.index("bottle"), radii=radii, paint=paint, lid=lid, tilt=rng.uniform(0.05, 0.28),
        gloss=0.35 if make == "opaque" else 0.85,
        crush=rng.uniform(0.01, 0.03) if make in ("clear", "tinted") and rng.random() < 0.25 else 0.0,
        crush_phase=rng.uniform(0, 2 * np.pi),
    )  # fmt: skip


def can(rng: np.random.Generator) -> Solid:
    """A drink can, standard, slim or tall: printed body, bare aluminium at both ends, lid with a tab."""
    body = rng.choice([0.287, 0.235, 0.196], p=[0.55, 0.2, 0.25]) * rng.uniform(0.96, 1.04)
    taper = 0.16 * body
    radii = outline(
        (0, body * 0.84), (0.014, body * 0.84), (0.02, body * 0.79), (0.03 + taper, body),
        (0.975 - taper, body), (1, body * 0.78),
    )  # fmt: skip
    metal = np.array([0.78, 0.79, 0.81], np.float32) * np.float32(rng.uniform(0.85, 1.1))
    print_start, print_end = 0.028 + taper * rng.uniform(0.1, 1.0), 0.985 - taper * rng.uniform(0.4, 1.0)
    design = artwork(rng)
    opening = rng.random() < 0.6
    tab_angle = rng.uniform(0, 2 * np.pi)

    def brushed(angle: Array) -> Array:
        return (metal * (1 + 0.22 * np.cos(angle * 5 + 1) * np.cos(angle * 2))[..., None]).astype(np.float32)

    def paint(v: Array, angle: Array) -> tuple[Array, Array]:
        rgb = brushed(angle)
        rgb = rgb * (1 - 0.35 * zone(v, 0.016, 0.024))[..., None]
        printed = zone(v, print_start, print_end)
        rgb = blend(rgb, design((v - print_start) / (print_end - print_start), angle), printed)
        return rgb, np.ones_like(v)

    def lid(x: Array, y: Array) -> Array:
        radius = np.hypot(x, y)
        rgb = metal * (0.92 + 0.12 * np.cos(np.arctan2(y, x) * 2 + 1))[..., None]
        rgb = rgb * (1 - 0.4 * ((radius > 0.8) & (radius < 0.9)))[..., None]
        along = x * np.cos(tab_angle) + y * np.sin(tab_angle)
        across = -x * np.sin(tab_angle) + y * np.cos(tab_angle)
        if opening:
            hole = np.hypot((along - 0.42) / 0.3, across / 0.34) < 1
            rgb = rgb * (1 - 0.85 * hole)[..., None]
        tab = np.hypot((along + 0.16) / 0.34, across / 0.19)
        rgb = rgb * (1 - 0.45 * ((tab > 0.75) & (tab < 1.15)))[..., None]
        shaded: Array = rgb.astype(np.float32)
        return shaded

    crushed = rng.random() < 0.2
    return Solid(
        class_id=NAMES.index("can"), radii=radii, paint=paint, lid=lid, tilt=rng.uniform(0.12, 0.4),
        gloss=rng.uniform(0.45, 0.8), crush=rng.uniform(0.03, 0.06) if crushed else 0.0,
        crush_phase=rng.uniform(0, 2 * np.pi),
    )  # fmt: skip
