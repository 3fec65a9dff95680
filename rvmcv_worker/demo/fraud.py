"""What a reverse vending machine may claim to have seen: the truth, another class, an object too many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rvmcv_worker.demo.sheet import Box, overlap

#: How much less sure than the server an honest machine is, whose model is a smaller one.
_LESS_SURE = 0.05
#: How sure a machine is of what is not there.
_BRAZEN = 0.9


@dataclass(frozen=True)
class Claim:
    """What a machine says, and whether it is made up."""

    what: str
    edge_result: dict[str, Any]
    is_false: bool


def certainty(detections: Sequence[dict[str, Any]]) -> float:
    """How sure the surest detection is; 0 where nothing was found."""
    return max((found["confidence"] for found in detections), default=0.0)


def claims(result: dict[str, Any], classes: Sequence[str], least: float) -> list[Claim]:
    """Return an honest claim and false ones about a picture with this result, `least` sure at least."""
    honest = [
        {
            "class": found["class"],
            "confidence": round(max(least, found["confidence"] - _LESS_SURE), 2),
            "bbox": [round(edge, 1) for edge in found["bbox"]],
        }
        for found in result["detections"]
    ]
    made = [Claim("the same", _told(honest), is_false=False)]
    others = [name for name in classes if honest and name != honest[0]["class"]]
    if others:
        made.append(
            Claim("another class", _told([{**honest[0], "class": others[0]}, *honest[1:]]), is_false=True)
        )
    phantom = {
        "class": classes[0],
        "confidence": _BRAZEN,
        "bbox": list(_free_corner(result["image_size"], [found["bbox"] for found in result["detections"]])),
    }
    made.append(Claim("one object more", _told([*honest, phantom]), is_false=True))
    return made


def _told(detections: list[dict[str, Any]]) -> dict[str, Any]:
    return {"detections": detections}


def _free_corner(size: tuple[int, int], taken: Sequence[Box]) -> Box:
    """Return the quarter of a picture of (width, height) that what was found covers least."""
    width, height = size[0] / 2, size[1] / 2
    corners = [(x, y, x + width, y + height) for x in (0.0, width) for y in (0.0, height)]
    return min(corners, key=lambda corner: max((overlap(corner, box) for box in taken), default=0.0))
