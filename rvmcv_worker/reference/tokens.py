"""Bearer tokens and what each may do."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import select

from rvmcv_worker.reference.queue import Queue
from rvmcv_worker.reference.states import Ability
from rvmcv_worker.reference.tables import Token
from rvmcv_worker.reference.turn import hash_token


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    name: str
    abilities: frozenset[Ability]


class Tokens:
    """Makes tokens and recognises them; only their hashes are kept."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

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

    def caller(self, token: str) -> Caller | None:
        """Return whose token this is; None when it is nobody's, or was revoked."""
        with self._queue.look() as turn:
            found = turn.session.scalar(
                select(Token).where(Token.token_hash == hash_token(token), Token.revoked_at.is_(None))
            )
        if found is None:
            return None
        return Caller(found.name, frozenset(Ability(name) for name in found.abilities))

    def revoke(self, name: str) -> int:
        """Make every token of this name useless and return how many there were."""
        with self._queue.turn() as turn:
            found = list(
                turn.session.scalars(select(Token).where(Token.name == name, Token.revoked_at.is_(None)))
            )
            for token in found:
                token.revoked_at = turn.now
        return len(found)
