"""What goes wrong again and again is told a few times a minute, and then by how often it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loguru import Record

#: So many of a kind are told in so many seconds.
_TOLD, _IN_S = 10, 60.0
_KINDS = frozenset({"WARNING", "ERROR"})
#: Of jobs in the other lanes everything is told: they take seconds at least, and each is asked about.
_LANE = "infer"


@dataclass
class _Kind:
    began_s: float
    last: Record
    count: int = 0


class Repeats:
    """Counts warnings and errors of a kind: of one event by one error code, or of one wording.

    A hundred inferences a second that fail for the same reason would else push everything else out.
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], _Kind] = {}

    def holds_back(self, record: Record, now_s: float) -> bool:
        """Whether there were enough of its kind."""
        if record["level"].name not in _KINDS:
            return False
        extra = record["extra"]
        if extra.get("lane", _LANE) != _LANE:
            return False
        code = extra.get("details", {}).get("error_code") or record["message"]
        last = record.copy()
        last["exception"] = None  # it would hold on to what its frames hold
        kind = self._kinds.setdefault((extra.get("event", ""), code), _Kind(now_s, last))
        kind.last = last
        kind.count += 1
        return kind.count > _TOLD

    def summaries(self, now_s: float, *, all_of_them: bool = False) -> list[Record]:
        """Return an event for each kind that was held back in a minute that is over."""
        over = [key for key, kind in self._kinds.items() if all_of_them or now_s - kind.began_s >= _IN_S]
        kinds = [self._kinds.pop(key) for key in over]
        return [_summary(kind) for kind in kinds if kind.count > _TOLD]


def _summary(kind: _Kind) -> Record:
    more = kind.count - _TOLD
    record = kind.last
    extra = {key: value for key, value in record["extra"].items() if key != "job_id"}
    record["extra"] = {**extra, "details": {**extra.get("details", {}), "repeated": more}}
    record["message"] = f"{more} more like this in a minute, the last of them: {record['message']}"
    return record
