"""Puts the summaries of a batch's shards together. They come from workers: what does not fit is left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

Count = Annotated[int, Field(ge=0, le=10**9)]
PERCENTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}


class _Told(BaseModel):
    """Part of what a worker tells; what is not named here is none of the server's business."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class Part(_Told):
    """A file of results in storage."""

    path: str
    sha256: str
    images: Count


class Histogram(_Told):
    """Durations in buckets, each wider than the one before by `growth`: bucket n ends at least_ms·growthⁿ."""

    least_ms: float = Field(gt=0, le=1000)
    growth: float = Field(gt=1, le=1.5)
    #: How many images, by the bucket's number, which is a string in JSON.
    buckets: dict[Annotated[str, StringConstraints(pattern=r"^-?[0-9]{1,3}$")], Count]

    def counted(self) -> Counter[int]:
        """Return the counts by number."""
        return Counter({int(number): count for number, count in self.buckets.items()})


class ShardSummary(_Told):
    """The result of a ``batch-inference`` job."""

    images_ok: Count
    images_failed: Count
    errors: dict[str, Count] = Field(default_factory=dict)
    classes: dict[str, Count] = Field(default_factory=dict)
    backends: dict[str, Count] = Field(default_factory=dict)
    parts: list[Part]
    latency_ms: dict[str, float | None] = Field(default_factory=dict)
    latency_histogram: Histogram | None = None
    model_used: str | None = None
    model_sha256: str | None = None


@dataclass(frozen=True)
class Shard:
    """A shard that is over."""

    number: int
    job_id: str
    status: str
    images: int | None
    first_index: int
    started_at: float | None
    finished_at: float | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None


def merge(shards: Sequence[Shard]) -> dict[str, Any]:
    """Return the summary of a batch whose shards are all over, in their order."""
    read = [(shard, _read(shard)) for shard in shards]
    good = [(shard, summary) for shard, summary in read if isinstance(summary, ShardSummary)]
    summaries = [summary for _shard, summary in good]
    missing = [_missing(shard, why) for shard, why in read if not isinstance(why, ShardSummary)]
    ok, failed = sum(s.images_ok for s in summaries), sum(s.images_failed for s in summaries)
    latency_ms, latency_is = _latency(summaries)
    took_s = _took_s([shard for shard, _summary in good])
    return {
        "images_ok": ok,
        "images_failed": failed,
        "errors": _added([s.errors for s in summaries]),
        "classes": _added([s.classes for s in summaries]),
        "backends": _added([s.backends for s in summaries]),
        "images_per_s": round((ok + failed) / took_s, 2) if took_s else None,
        "latency_ms": latency_ms,
        "latency_is": latency_is,
        "models_used": sorted({s.model_used for s in summaries if s.model_used}),
        "models_sha256": sorted({s.model_sha256 for s in summaries if s.model_sha256}),
        "parts": [part for shard, summary in good for part in _parts(shard, summary)],
        "missing": missing,
    }


def _read(shard: Shard) -> ShardSummary | dict[str, Any]:
    """Return a shard's summary, or the error for which there is none."""
    if shard.status != "completed":
        return shard.error or {"code": shard.status, "message": f"the shard was {shard.status}"}
    try:
        return ShardSummary.model_validate(shard.result)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = f"its worker's summary cannot be read: {where}: {first['msg']}"
        return {"code": "summary_invalid", "message": message}


def _missing(shard: Shard, why: dict[str, Any]) -> dict[str, Any]:
    return {
        "shard": shard.number,
        "job_id": shard.job_id,
        "status": shard.status,
        "first_index": shard.first_index,
        "images": shard.images,
        "error": {key: why[key] for key in ("code", "message") if key in why},
    }


def _parts(shard: Shard, summary: ShardSummary) -> list[dict[str, Any]]:
    first_index, parts = shard.first_index, []
    for part in summary.parts:
        parts.append({"shard": shard.number, "first_index": first_index, **part.model_dump()})
        first_index += part.images
    return parts


def _added(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)


def _took_s(shards: Sequence[Shard]) -> float:
    """Return the seconds from the first start to the last end: the workers' time runs side by side."""
    starts = [shard.started_at for shard in shards if shard.started_at is not None]
    ends = [shard.finished_at for shard in shards if shard.finished_at is not None]
    return max(ends) - min(starts) if starts and ends else 0.0


def _latency(
    summaries: Sequence[ShardSummary],
) -> tuple[dict[str, float | None], Literal["exact", "histogram", "upper_bound"]]:
    """Return the percentiles of all images, and how they are meant.

    Percentiles of parts do not add up to those of the whole. Histograms do; without them the largest of
    the parts' is what the whole's cannot exceed.
    """
    if len(summaries) == 1:
        return {name: summaries[0].latency_ms.get(name) for name in PERCENTILES}, "exact"
    histograms = [summary.latency_histogram for summary in summaries]
    first = histograms[0] if histograms else None
    if first is not None and all(
        h and (h.least_ms, h.growth) == (first.least_ms, first.growth) for h in histograms
    ):
        counts = sum((h.counted() for h in histograms if h), Counter[int]())
        return {name: _percentile(counts, share, first) for name, share in PERCENTILES.items()}, "histogram"
    told = {name: [summary.latency_ms.get(name) for summary in summaries] for name in PERCENTILES}
    bounds = {
        name: max((value for value in values if value is not None), default=None)
        if None not in values
        else None
        for name, values in told.items()
    }
    return bounds, "upper_bound"


def _percentile(counts: Counter[int], share: float, like: Histogram) -> float | None:
    wanted, seen = math.ceil(share * sum(counts.values())), 0
    for number in sorted(counts):
        seen += counts[number]
        if seen >= wanted:
            return float(f"{like.least_ms * like.growth ** (number - 0.5):.3g}")
    return None
