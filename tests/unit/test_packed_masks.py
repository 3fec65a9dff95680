"""Masks come out of their packing as they went in, as often as they are asked for."""

from __future__ import annotations

import numpy as np

from rvmcv_worker.compute.packed_masks import PackedMasks


def test_masks_of_any_size_are_kept_to_the_pixel() -> None:
    for size in ((1, 1), (17, 31), (480, 640)):
        masks = np.random.default_rng(0).integers(0, 2, (5, *size)).astype(bool)
        packed = PackedMasks(size)
        for mask in masks:
            packed.add(mask)
        assert len(packed) == 5
        for _ in range(2):
            unpacked = list(packed)
            assert all(mask.dtype == bool for mask in unpacked)
            assert np.array_equal(unpacked, masks)


def test_a_large_mask_takes_little() -> None:
    packed = PackedMasks((3000, 4000))
    mask = np.zeros((3000, 4000), bool)
    mask[500:2000, 1000:3000] = True
    packed.add(mask)
    assert sum(len(one) for one in packed._packed) < 20_000
