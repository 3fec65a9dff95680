"""A solid as it looks from one side: which pixels it covers, and in what colour."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rvmcv_worker.demo.layers import Layer, around
from rvmcv_worker.demo.solids import Solid


@dataclass(frozen=True)
class Pose:
    """Where and how an object stands in the picture; lengths in pixels, angles in radians."""

    x: float
    y: float
    height: float
    rotation: float


def render(solid: Solid, pose: Pose, size_px: int, light_rad: float) -> Layer:
    """Draw `solid` for a picture of `size_px`²; the layer is empty when it lies outside.

    `light_rad` is where the light comes from in the picture's plane (-pi/2: from above).
    """
    reach = pose.height * (0.55 + solid.tilt * float(solid.radii.max()) + solid.crush) + 2
    reach = float(np.hypot(reach, pose.height * float(solid.radii.max())))
    window = around(pose.x, pose.y, reach, size_px)
    dy, dx = np.mgrid[window].astype(np.float32)
    dx, dy = (dx - pose.x) / pose.height, (dy - pose.y) / pose.height
    cos, sin = math.cos(pose.rotation), math.sin(pose.rotation)
    u, y = dx * cos + dy * sin, dy * cos - dx * sin + 0.5
    u = u + solid.crush * np.sin(y * 7 + solid.crush_phase) * 0.6

    at = np.linspace(0, 1, len(solid.radii), dtype=np.float32)
    radius = np.interp(y, at, solid.radii).astype(np.float32)
    # A ring of the surface is seen as an ellipse: its near side lies lower in the picture.
    v = y - solid.tilt * np.sqrt(np.maximum(radius**2 - u**2, 0))
    normal_u = np.clip(u / radius, -1, 1)
    angle = np.arcsin(normal_u)
    side = ((radius - np.abs(u)) * pose.height + 0.5).clip(0, 1)
    side = side * ((1 - v) * pose.height + 0.5).clip(0, 1) * (y * pose.height + 0.5).clip(0, 1)
    rim = float(solid.radii[0])
    lid_x, lid_y = u / rim, y / (rim * solid.tilt)
    on_lid = ((1 - np.hypot(lid_x, lid_y)) * rim * solid.tilt * pose.height + 0.5).clip(0, 1)

    rgb, opacity = solid.paint(v.clip(0, 1), angle)
    slope = np.interp(v, at, np.gradient(solid.radii, at)).astype(np.float32)
    normal_v = -slope / np.sqrt(1 + slope**2)
    light_u, light_v = math.cos(light_rad - pose.rotation), math.sin(light_rad - pose.rotation)
    shade = 0.45 + 0.5 * np.sqrt(1 - normal_u**2) + 0.3 * normal_u * light_u + 0.25 * normal_v * light_v
    shade += 4 * solid.crush * np.sin(v * 19 + solid.crush_phase) * np.sin(angle * 3 + v * 11)
    # The highlight runs along the side that faces the light, a fainter one along the other.
    glint = np.exp(-(((normal_u - 0.55 * light_u - 0.1) / 0.1) ** 2))
    glint = solid.gloss * (glint + 0.35 * np.exp(-(((normal_u + 0.62) / 0.06) ** 2)))
    rgb = rgb * shade[..., None] + 0.6 * glint[..., None]
    opacity = np.maximum(opacity, 0.8 * glint)

    lid_rgb = solid.lid(lid_x, lid_y) * np.float32(0.95 + 0.15 * -light_v)
    rgb = rgb + (lid_rgb - rgb) * on_lid[..., None]
    opacity = np.maximum(opacity * side, on_lid)
    cover = np.maximum(side, on_lid).astype(np.float32)
    return Layer(window, rgb.clip(0, 1).astype(np.float32), opacity, cover)
