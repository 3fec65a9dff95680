"""What the machine saw against what the server sees: which boxes are of one object, and what does not fit.

Boxes are matched greedily: of all pairs that overlap enough, those of one class before those of two, and
among equals the one that overlaps most. An optimal assignment would now and then find one pair more, by
taking from two boxes their best partners; a verdict that accuses somebody must be one that a person who
looks at the picture arrives at too. Same classes first, because two boxes of different classes over one
object are common (suppression works class by class), and the right one must not lose to the tighter one.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Seen:
    """One detection, of either side."""

    class_name: str
    confidence: float
    #: ``x1, y1, x2, y2`` in pixels of the server's image; None where the machine told no box.
    box: Box | None = None


@dataclass(frozen=True)
class Thresholds:
    """When two boxes are of one object, and when two detections differ."""

    #: Boxes that overlap at least so much are of one object.
    iou: float
    #: Confidences of one object that are further apart are a mismatch.
    confidence_difference: float
    #: The job's own: what the machine saw with less confidence, the server would not have told either.
    confidence: float


@dataclass(frozen=True)
class Match:
    """A detection of each side that are of one object; `iou` is None where the machine told no box."""

    edge: int
    server: int
    iou: float | None


def compare(edge: Sequence[Seen], server: Sequence[Seen], thresholds: Thresholds) -> dict[str, Any]:
    """Return matches, what has none, and the verdict with its reasons."""
    matches = _match(edge, server, thresholds.iou)
    by_edge = {match.edge for match in matches}
    by_server = {match.server for match in matches}
    edge_only = [index for index in range(len(edge)) if index not in by_edge]
    server_only = [index for index in range(len(server)) if index not in by_server]
    reasons = [
        *_missing_at_server(edge, edge_only, thresholds),
        *_missing_at_edge(server, server_only),
        *(reason for match in matches for reason in _differences(edge, server, match, thresholds)),
    ]
    agreeing = sum(same_class(edge[match.edge], server[match.server]) for match in matches)
    overlaps = [match.iou for match in matches if match.iou is not None]
    return {
        "matches": [_told(edge, server, match) for match in matches],
        "edge_only": edge_only,
        "server_only": server_only,
        "class_agreement": round(agreeing / len(matches), 4) if matches else None,
        "mean_iou": round(sum(overlaps) / len(overlaps), 4) if overlaps else None,
        "mismatch": bool(reasons),
        "reasons": reasons,
        "thresholds": {
            "iou": thresholds.iou,
            "confidence_difference": thresholds.confidence_difference,
            "confidence": thresholds.confidence,
        },
    }


def iou(one: Box, other: Box) -> float:
    """Return how much of what two boxes cover together they share, 0 to 1."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    together = _area(one) + _area(other) - shared
    if not together:  # too small for their areas to be numbers, and yet they overlap
        return 1.0
    # The clamp is for rounding: two equal boxes far from the origin.
    return min(1.0, shared / together)


def same_class(one: Seen, other: Seen) -> bool:
    """Whether two names are one class: ``PET bottle``, ``pet-bottle`` and ``PET_Bottle`` are."""
    return _plain(one.class_name) == _plain(other.class_name)


def scaled(box: Box, from_size: tuple[int, int], to_size: tuple[int, int]) -> Box:
    """Return a box of an image of one (width, height) in the same image of another."""
    x, y = to_size[0] / from_size[0], to_size[1] / from_size[1]
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def _match(edge: Sequence[Seen], server: Sequence[Seen], least_iou: float) -> list[Match]:
    pairs = []
    for i, mine in enumerate(edge):
        for j, theirs in enumerate(server):
            if mine.box and theirs.box and (overlap := iou(mine.box, theirs.box)) >= least_iou:
                pairs.append((not same_class(mine, theirs), -overlap, i, j))
    taken_edge: set[int] = set()
    taken_server: set[int] = set()
    matches = []
    for _, overlap, i, j in sorted(pairs):
        if i not in taken_edge and j not in taken_server:
            taken_edge.add(i)
            taken_server.add(j)
            matches.append(Match(i, j, -overlap))
    matches += _match_without_boxes(edge, server, taken_server)
    return sorted(matches, key=lambda match: match.edge)


def _match_without_boxes(edge: Sequence[Seen], server: Sequence[Seen], taken: set[int]) -> list[Match]:
    """Match what the machine saw without saying where: by class, the most confident first on both sides."""
    free: dict[str, list[int]] = collections.defaultdict(list)
    for j in sorted(range(len(server)), key=lambda j: server[j].confidence):
        if j not in taken:
            free[_plain(server[j].class_name)].append(j)
    boxless = [i for i, mine in enumerate(edge) if mine.box is None]
    return [
        Match(i, candidates.pop(), None)
        for i in sorted(boxless, key=lambda i: -edge[i].confidence)
        if (candidates := free[_plain(edge[i].class_name)])
    ]


def _missing_at_server(
    edge: Sequence[Seen], indexes: Sequence[int], thresholds: Thresholds
) -> list[dict[str, str]]:
    return [
        _reason(
            "missing_at_server",
            f"the machine saw {edge[index].class_name} ({edge[index].confidence:.2f}), the server does not",
        )
        for index in indexes
        if edge[index].confidence >= thresholds.confidence
    ]


def _missing_at_edge(server: Sequence[Seen], indexes: Sequence[int]) -> list[dict[str, str]]:
    return [
        _reason(
            "missing_at_edge",
            f"the server sees {server[index].class_name} ({server[index].confidence:.2f}), the machine not",
        )
        for index in indexes
    ]


def _differences(
    edge: Sequence[Seen], server: Sequence[Seen], match: Match, thresholds: Thresholds
) -> list[dict[str, str]]:
    mine, theirs = edge[match.edge], server[match.server]
    if not same_class(mine, theirs):
        return [
            _reason(
                "class_differs",
                f"the machine saw {mine.class_name} where the server sees {theirs.class_name}",
            )
        ]
    apart = abs(mine.confidence - theirs.confidence)
    if apart > thresholds.confidence_difference:
        return [
            _reason(
                "confidence_differs",
                f"{mine.class_name}: the machine is {mine.confidence:.2f} sure, the server "
                f"{theirs.confidence:.2f}; at most {thresholds.confidence_difference:g} apart is usual",
            )
        ]
    return []


def _told(edge: Sequence[Seen], server: Sequence[Seen], match: Match) -> dict[str, Any]:
    mine, theirs = edge[match.edge], server[match.server]
    return {
        "edge": match.edge,
        "server": match.server,
        "iou": None if match.iou is None else round(match.iou, 4),
        "class_agrees": same_class(mine, theirs),
        "confidence_difference": round(mine.confidence - theirs.confidence, 4),
    }


def _reason(code: str, message: str) -> dict[str, str]:
    return {"code": code, "message": message}


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip()).casefold()
