"""What a batch came to so far: counts, errors, and how long its images took, in a few kilobytes."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

#: Two durations that differ by less than this share a bucket: percentiles are right within 1 %.
_GROWTH = 1.02
#: The shortest duration that is told from 0, in milliseconds.
_LEAST_MS = 0.01
#: Names of classes and backends come from an engine, which may say anything.
_MAX_NAMES, _MAX_NAME_CHARS = 1000, 100
#: Under which names beyond those are counted.
_OTHER = "(other)"


class LatencyBuckets(BaseModel):
    """Durations counted in buckets that grow by 2 %: some 700 of them reach from 0.01 ms to ten minutes."""

    model_config = ConfigDict(extra="forbid")

    buckets: Counter[int] = Field(default_factory=Counter)

    def add(self, milliseconds: float) -> None:
        """Count one."""
        position = math.log(max(milliseconds, _LEAST_MS) / _LEAST_MS, _GROWTH)
        self.buckets[math.ceil(position)] += 1

    def told(self) -> dict[str, Any]:
        """Return the counts as another program can add them to those of another batch.

        Bucket n ends at least_ms · growthⁿ.
        """
        buckets = {str(number): count for number, count in sorted(self.buckets.items())}
        return {"least_ms": _LEAST_MS, "growth": _GROWTH, "buckets": buckets}

    def percentile(self, fraction: float) -> float | None:
        """Return the duration in ms that `fraction` of all do not exceed; None where there is none."""
        wanted = math.ceil(fraction * self.buckets.total())
        seen = 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= wanted:
                return float(f"{_LEAST_MS * _GROWTH ** (bucket - 0.5):.3g}")
        return None


class BatchSummary(BaseModel):
    """Of all images up to one; goes into a checkpoint and, in other words, into the result."""

    model_config = ConfigDict(extra="forbid")

    images_ok: int = 0
    images_failed: int = 0
    #: By error code.
    errors: Counter[str] = Field(default_factory=Counter)
    #: Detections by class.
    classes: Counter[str] = Field(default_factory=Counter)
    #: Images by "backend precision": the first may be answered by another than the rest.
    backends: Counter[str] = Field(default_factory=Counter)
    latency: LatencyBuckets = Field(default_factory=LatencyBuckets)
    #: Spent on the images by all attempts, in seconds.
    spent_s: float = 0.0

    def add(self, result: dict[str, Any]) -> None:
        """Count what an engine answered for an image."""
        self.images_ok += 1
        for detection in result["detections"]:
            _count(self.classes, str(detection["class"]))
        _count(self.backends, f"{result['backend']} {result['precision']}")
        self.latency.add(processing_ms(result))

    def add_error(self, code: str) -> None:
        """Count an image that has no result."""
        self.images_failed += 1
        self.errors[code] += 1

    def told(self) -> dict[str, Any]:
        """Return what the job's result says of it."""
        done = self.images_ok + self.images_failed
        most = self.backends.most_common(1)
        backend, _, precision = most[0][0].partition(" ") if most else ("", "", "")
        return {
            "images_ok": self.images_ok,
            "images_failed": self.images_failed,
            "errors": dict(self.errors),
            "classes": dict(self.classes),
            "images_per_s": round(done / self.spent_s, 2) if self.spent_s else None,
            "latency_ms": {f"p{part}": self.latency.percentile(part / 100) for part in (50, 95, 99)},
            "latency_histogram": self.latency.told(),
            "backend": backend or None,
            "precision": precision or None,
            "backends": dict(self.backends),
        }


def processing_ms(result: dict[str, Any]) -> float:
    """Return how long an engine worked on an image, in milliseconds; its wait for a turn is none of it."""
    steps: dict[str, float] = result["timings"]
    return 1000 * sum(seconds for step, seconds in steps.items() if step not in {"queue", "load"})


def _count(counter: Counter[str], name: str) -> None:
    name = name[:_MAX_NAME_CHARS]
    counter[name if name in counter or len(counter) < _MAX_NAMES else _OTHER] += 1
