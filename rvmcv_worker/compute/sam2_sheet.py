"""`masks.jpg`: what a training changed, to look at: image, ground truth, mask before, mask after.

The images are spread evenly over the split: which of them would show most is not known before the training,
and picked ones would flatter it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rvmcv_worker.compute.mask_metrics import iou
from rvmcv_worker.compute.packed_masks import PackedMasks
from rvmcv_worker.compute.sam2_sheet_picture import Found, Row, draw

if TYPE_CHECKING:
    from rvmcv_worker.compute.sam2_network import Network
    from rvmcv_worker.compute.sam2_proof import Proof
    from rvmcv_worker.compute.sam2_samples import Samples

#: Most images on the sheet.
_MAX_IMAGES = 6


@dataclass(frozen=True)
class _Taken:
    """A model's masks of one image, and how well each fits."""

    masks: PackedMasks
    ious: list[float]


class Sheet:
    """Keeps the masks of a few images, before and after, packed, and draws them at the end."""

    def __init__(self, samples: Samples, names: list[str]) -> None:
        self._samples = samples
        self._names = names
        self._chosen = spread(len(samples))
        self._before: dict[int, _Taken] = {}
        self._after: dict[int, _Taken] = {}

    def before(self, proof: Proof, network: Network) -> None:
        """Take the masks of the model that the training begins with."""
        self._before = {index: self._take(proof, network, index) for index in self._chosen}

    def after(self, proof: Proof, network: Network) -> None:
        """Take the masks of the model that is delivered."""
        self._after = {index: self._take(proof, network, index) for index in self._chosen}

    def write(self, path: Path) -> None:
        """Draw what was taken to `path`, a JPEG; of a model that was not asked the cells are blank."""
        total, shown = len(self._samples), len(self._chosen)
        which = f"{shown} of {total} images, evenly spread" if shown < total else f"all images ({total})"
        picture = draw(
            map(self._row, self._chosen),
            self._names,
            title=f"SAM2 on the {self._samples.split} split, before and after training",
            subtitle=f"{which}; each mask is prompted with the ground truth's box; its number is its IoU",
        )
        path.write_bytes(picture)

    def _take(self, proof: Proof, network: Network, index: int) -> _Taken:
        found = proof.masks(network, index)
        packed = PackedMasks(found[0].shape if found else (0, 0))
        ious = []
        for mask, labelled in zip(found, self._samples.objects(index), strict=True):
            packed.add(mask)
            ious.append(iou(mask, labelled.mask(*mask.shape)))
        return _Taken(packed, ious)

    def _row(self, index: int) -> Row:
        image, objects = self._samples.image(index), self._samples.objects(index)
        return Row(
            name=Path(self._samples.labelled(index).path).name,
            image=image,
            classes=[labelled.class_id for labelled in objects],
            truth=(labelled.mask(*image.shape[:2]) for labelled in objects),
            before=_found(self._before.get(index)),
            after=_found(self._after.get(index)),
        )


def spread(count: int, most: int = _MAX_IMAGES) -> list[int]:
    """Return at most `most` of `count` indices, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(position * (count - 1) / (most - 1)) for position in range(most)]


def _found(taken: _Taken | None) -> Found | None:
    return Found(taken.masks, taken.ious) if taken else None
