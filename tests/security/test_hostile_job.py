"""A job that wants out: what it reaches from a plain process, and that behind the wall it is nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ordinary_user
from tests.attacks.main import ATTACKS

pytestmark = pytest.mark.slow

_TREE = Path(__file__).parents[2]
_TIMEOUT_S = 240.0
#: Attack -> what it has reached, or by what it was refused.
Column = dict[str, dict[str, str]]
#: Whom a daemon may run as: no process limit holds root, and none but root may do the worst.
USERS = ["ordinary", "root"] if os.getuid() == 0 else ["ordinary"]


def _attacked(user: str) -> dict[str, Column]:
    """Let a daemon of this user run the hostile job, without a wall and behind it."""
    with tempfile.TemporaryDirectory(
        prefix="rvmcv-hostile-"
    ) as directory:  # pytest's own are closed to others
        if user == "ordinary" and os.getuid() == 0:
            os.chown(directory, ordinary_user.UID, ordinary_user.UID)
        argv = [sys.executable, "-m", "tests.hostile_daemon", directory]
        run = subprocess.run(
            ordinary_user.command(argv) if user == "ordinary" else ordinary_user.private(argv),
            cwd=_TREE,
            env={
                "PATH": os.environ["PATH"],
                "HOME": directory,
                "CANARY": f"canary-environment-{uuid.uuid4().hex}",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            start_new_session=True,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        found: dict[str, Column] = json.loads(run.stdout)
    return found


@pytest.fixture(scope="module")
def seen() -> dict[str, dict[str, Column]]:
    """User -> where ("plain", "none", "wall") -> what each attack has reached."""
    if not ordinary_user.is_possible():
        pytest.skip("util-linux is needed to run as an ordinary user")
    return {user: _attacked(user) for user in USERS}


@pytest.fixture(scope="module", autouse=True)
def table(seen: dict[str, dict[str, Column]], pytestconfig: pytest.Config) -> Iterator[None]:
    """Print what each attack has reached, after the tests."""
    yield
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        sys.stdout.write("\n" + "\n".join(_lines(seen)) + "\n")


def _lines(seen: dict[str, dict[str, Column]]) -> Iterator[str]:
    yield f"{'attack':<62} {'without the wall':<34} {'no bubblewrap':<14} behind the wall"
    for attack in ATTACKS:
        plain, none, wall = (_reached(seen, where, attack.name) for where in ("plain", "none", "wall"))
        works = ascii(plain)[1:-1] if plain else f"(not here: it takes {attack.needs or attack.by})"
        yield f"{attack.name:<62} {works[:33]:<34} {'open' if none else '-':<14} {ascii(wall)[1:-1] or '-'}"


def _reached(seen: dict[str, dict[str, Column]], where: str, attack: str) -> str:
    """Return what an attack has reached as any of the users."""
    for user in USERS:
        if reached := seen[user][where].get(attack, {}).get("reached"):
            return reached
    return ""


@pytest.mark.parametrize("user", USERS)
def test_behind_the_wall_nothing_is_reached(seen: dict[str, dict[str, Column]], user: str) -> None:
    wall = seen[user]["wall"]
    assert {name: found["reached"] for name, found in wall.items() if "reached" in found} == {}
    assert "canary-" not in json.dumps(wall)


@pytest.mark.parametrize("user", USERS)
def test_every_attack_was_tried_and_none_is_broken(seen: dict[str, dict[str, Column]], user: str) -> None:
    tried = {attack.name for attack in ATTACKS if attack.tried_as(user)}
    for where, column in seen[user].items():
        assert tried <= set(column), where
        assert {name: found for name, found in column.items() if "broken" in found} == {}


@pytest.mark.parametrize("attack", [attack.name for attack in ATTACKS if not attack.needs])
def test_without_the_wall_it_works(seen: dict[str, dict[str, Column]], attack: str) -> None:
    by = next(found.by for found in ATTACKS if found.name == attack)
    if by == "root" and os.getuid() != 0:
        pytest.skip("it works for root alone, and these tests run as an ordinary user")
    assert _reached(seen, "plain", attack)


@pytest.mark.parametrize("user", USERS)
def test_without_the_wall_the_secrets_are_those_of_the_daemon(
    seen: dict[str, dict[str, Column]], user: str
) -> None:
    plain = json.dumps(seen[user]["plain"])
    for secret in (
        "token",
        "config",
        "environment",
        "tmp",
        "shm",
        "other-job",
        "frozen",
        "service",
        "system-v",
    ):
        assert f"canary-{secret}-" in plain
