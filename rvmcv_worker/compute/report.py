"""What a data set turned out to be: filled in as the preflight goes, so that a failure has a report too."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rvmcv_worker.compute.faults import MAX_LISTED, FaultLog
from rvmcv_worker.compute.layouts import Item
from rvmcv_worker.compute.leaks import Leak
from rvmcv_worker.compute.preflight import Sample
from rvmcv_worker.compute.printable import printable

_MAX_BYTES = 1_000_000
_MAX_EXAMPLES = 10


class Report:
    """The data set's report."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.layout = ""
        self.faults = FaultLog()
        self.warnings: list[str] = []
        self.skipped: dict[str, int] = {}
        self.images = 0
        self.bad_images = 0
        self._splits: dict[str, dict[str, Any]] = {}
        self._leaks: dict[str, dict[str, Any]] = {}

    @property
    def bad_fraction(self) -> float:
        """Bad images among all."""
        return self.bad_images / self.images if self.images else 0.0

    def add_split(self, split: str, items: Sequence[Item], samples: dict[str, Sample]) -> None:
        """Count what of a split will train."""
        counts = Counter(class_id for item in items for class_id in samples[item.image].classes)
        self._splits[split] = {
            "images": len(items),
            "labels": sum(item.label is not None for item in items),
            "instances": sum(counts.values()),
            #: Images without an instance, with an empty label file or with none.
            "background": sum(not samples[item.image].classes for item in items),
            "without_label_file": sum(item.label is None for item in items),
            "per_class": {name: counts[class_id] for class_id, name in enumerate(self.names)},
        }

    def add_leaks(
        self, one: str, other: str, leaks: Sequence[Leak], items: Mapping[str, Sequence[Item]]
    ) -> None:
        """Note images that two splits share."""
        equal = sum(leak.distance is None for leak in leaks)
        examples = sorted(leaks, key=lambda leak: -1 if leak.distance is None else leak.distance)[
            :_MAX_EXAMPLES
        ]
        self._leaks[f"{one}/{other}"] = {
            "equal": equal,
            "near": len(leaks) - equal,
            "examples": [
                {
                    one: printable(items[one][leak.earlier].image),
                    other: printable(items[other][leak.later].image),
                    "distance": leak.distance,
                }
                for leak in examples
            ],
        }
        if leaks:
            self.warnings.append(
                f"leak: of {len(items[other])} images of {other}, {equal} are equal to one of {one} and "
                f"{len(leaks) - equal} nearly so; figures measured on {other} look better than they are"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON carries it, under 1 MB."""
        report: dict[str, Any] = {
            "names": list(self.names),
            "layout": self.layout,
            "splits": self._splits,
            "leaks": self._leaks,
            "faults": [],
            "fault_counts": dict(self.faults.counts),
            "images": self.images,
            "bad_images": self.bad_images,
            "bad_fraction": round(self.bad_fraction, 6),
            "warnings": self.warnings[:100],
            "skipped": self.skipped,
        }
        listed = MAX_LISTED
        report["faults"] = self.faults.listed(listed)
        while listed and len(json.dumps(report)) > _MAX_BYTES:
            listed //= 2
            report["faults"] = self.faults.listed(listed)
        return report

    def write(self, path: Path) -> dict[str, Any]:
        """Write the report to a file and return it."""
        report = self.as_dict()
        path.write_text(json.dumps(report, indent=1), encoding="ascii")
        return report
