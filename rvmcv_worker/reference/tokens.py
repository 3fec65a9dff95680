"""Bearer tokens and what each may do."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import select

from rvmcv_worker.reference.queue import Queue
from rvmcv_worker.reference.states import Ability
from rvmcv_worker.reference.tables import Token
from rvmcv_worker.reference.turn import hash_token

#: For so long a token that was revoked at another server on the same database still works here.
RECENT_S = 5.0


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    name: str
    abilities: frozenset[Ability]


class Tokens:
    """Makes tokens and recognises them; only their hashes are kept."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        #: By hash: whose token it is, and until when that need not be asked again.
        self._recent: dict[str, tuple[Caller, float]] = {}
        #: Rises with each revocation: what was asked before one is not kept after it.
        self._revocations = 0
        self._lock = threading.Lock()

    def make(self, name: str, abilities: Iterable[Ability]) -> str:
        """Return a new token; it cannot be shown again."""
        token = f"rvm_{secrets.token_urlsafe(32)}"
        with self._queue.turn() as turn:
            turn.session.add(
                Token(
                    name=name,
                    token_hash=hash_token(token),
                    abilities=[ability.value for ability in abilities],
                    created_at=turn.now,
                )
            )
        return token

    def recent_caller(self, token: str) -> Caller | None:
        """Return whose token this is if that was asked a moment ago; does not wait for the database."""
        found, until = self._recent.get(hash_token(token), (None, 0.0))
        return found if time.monotonic() < until else None

    def caller(self, token: str) -> Caller | None:
        """Return whose token this is; None when it is nobody's, or was revoked."""
        token_hash, revocations = hash_token(token), self._revocations
        with self._queue.look() as turn:
            found = turn.session.scalar(
                select(Token).where(Token.token_hash == token_hash, Token.revoked_at.is_(None))
            )
        if found is None:
            return None
        who = Caller(found.name, frozenset(Ability(name) for name in found.abilities))
        with self._lock:
            if revocations == self._revocations:
                self._recent[token_hash] = (who, time.monotonic() + RECENT_S)
        return who

    def revoke(self, name: str) -> int:
        """Make every token of this name useless and return how many there were."""
        with self._queue.turn() as turn:
            found = list(
                turn.session.scalars(select(Token).where(Token.name == name, Token.revoked_at.is_(None)))
            )
            for token in found:
                token.revoked_at = turn.now
        with self._lock:
            self._revocations += 1
            self._recent.clear()
        return len(found)
