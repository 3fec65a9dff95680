"""One transaction at one moment, and how it refuses."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from sqlalchemy.orm import Session

from rvmcv_worker.reference.settings import Settings
from rvmcv_worker.reference.states import Reason

#: Key in the session's `info`: whom this transaction wakes, by job types and `answer_key`s.
WAKE = "wake"


class FencedError(Exception):
    """The write is refused for good: the attempt stops, publishes nothing and wipes."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True)
class Turn:
    """What each step of the queue works with: an open transaction and the time that it sees."""

    session: Session
    #: Seconds since 1970 on the database's clock.
    now: float
    settings: Settings
    #: Makes lease tokens; kept outside the database, which stores only their hashes.
    lease_key: bytes

    def wake_polls(self, job_type: str) -> None:
        """Note that this transaction leaves something to offer: held polls are woken after its commit."""
        self.session.info.setdefault(WAKE, set()).add(job_type)

    def wake_answer(self, row_id: int) -> None:
        """Note that this job has ended: the request that waits for its result is woken after the commit."""
        self.session.info.setdefault(WAKE, set()).add(answer_key(row_id))

    def lease_token(self, claim_id: str) -> str:
        """Return the token of a claim: always the same, so that a repeated claim gets its old answer."""
        return hmac.new(self.lease_key, claim_id.encode(), hashlib.sha256).hexdigest()


def answer_key(row_id: int) -> str:
    """Return what the request that waits for this job's result is woken by: the name of no job type."""
    return f"answer:{row_id}"


def hash_token(token: str) -> str:
    """Return what is stored of a token: its SHA-256, in hex."""
    return hashlib.sha256(token.encode()).hexdigest()
