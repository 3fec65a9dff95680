"""What all tests share: the real server, the real daemon, real data where it is, and time budgets."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from loguru import logger

from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.reference.settings import Settings, Timing
from tests import canary
from tests.postgres import MISSING, Postgres

# Pictures here are small: several threads would mostly wait for each other, and burn what others need.
# Read when torch is imported, by this process and by what inherits its environment.
os.environ.setdefault("OMP_NUM_THREADS", "1")

#: Seconds of the tests of each suite, added up, when two run at a time on two idle cores: half as many pass.
EXPECTED_S = {"unit": 70.0, "integration": 800.0, "acceptance": 900.0, "security": 160.0}
#: A machine may be this much slower, or shared, before a suite counts as over its budget.
_SLACK = 1.7
BUDGET_S = {suite: expected_s * _SLACK for suite, expected_s in EXPECTED_S.items()}

#: These boot one system, and share it.
_BOOTED = "tests/acceptance/booted/"

hypothesis_settings.register_profile("chaos", max_examples=2000)
# The same inputs in every run: a test that fails by chance blames a change that has nothing to do with it.
# New ones are tried by `make fuzz`, and by `--hypothesis-profile default`.
hypothesis_settings.register_profile("steady", hypothesis_settings.get_profile("ci"))
if "RVMCV_FUZZ_MINUTES" not in os.environ:
    hypothesis_settings.load_profile("steady")

_spent_s: dict[str, float] = defaultdict(float)
_secrets_left: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up the time of each suite, fixtures included."""
    parts = Path(report.nodeid.split("::")[0]).parts
    if len(parts) > 1:
        _spent_s[parts[1]] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the time of each suite against its budget."""
    for suite, spent_s in sorted(_spent_s.items()):
        expected_s, budget_s = EXPECTED_S.get(suite, 0), BUDGET_S.get(suite, 0)
        terminalreporter.write_line(
            f"{suite}: {spent_s:.0f} s (expected {expected_s:.0f} s, at most {budget_s:.0f} s)"
        )
    for found in _secrets_left:
        terminalreporter.write_line(f"a daemon left a secret that it was given: {found}", red=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give out tests by file; those of the booted system together, since they share one."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _BOOTED if nodeid.startswith(_BOOTED) else str(super()._split_scope(nodeid))

    return ByFile(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Hear from one of several processes that ran tests side by side what its daemons left."""
    _secrets_left.extend(getattr(node, "workeroutput", {}).get("secrets_left", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run in which a suite went over its budget, or a daemon left a secret in its log or its state."""
    if "RVMCV_FUZZ_MINUTES" in os.environ:
        return  # `make fuzz` takes as long as it was told, and starts no daemon
    _secrets_left.extend(canary.left_behind())
    if (told := getattr(session.config, "workeroutput", None)) is not None:
        told["secrets_left"] = _secrets_left  # the process that started this one decides
        return
    over = [suite for suite, spent_s in _spent_s.items() if spent_s > BUDGET_S.get(suite, 0)]
    if (over or _secrets_left) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets and models; tests that need it skip where it is not."""
    folder = Path(os.environ.get("RVMCV_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "datasets").is_dir():
        pytest.skip(f"no real data at {folder}: set RVMCV_SHARED")
    return folder


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL for the whole run; each module makes databases of its own in it."""
    if MISSING:
        pytest.skip(MISSING)
    with Postgres() as running:
        yield running


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An empty database of each kind that the reference server runs on."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path_factory.mktemp('database') / 'reference.db'}"
    postgres: Postgres = request.getfixturevalue("postgres")
    return postgres.new_database()


def _quick() -> Settings:
    return Settings(timing=Timing(report_interval_s=1.0, hand_back_delay_s=0.1))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ReferenceServer]:
    """A reference server of the test's own."""
    with ReferenceServer(tmp_path / "server", settings=_quick()) as running:
        yield running


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReferenceServer]:
    """A reference server for all tests of a module that leave it as they found it."""
    with ReferenceServer(tmp_path_factory.mktemp("server"), settings=_quick()) as running:
        yield running


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Every message that is logged during the test, with its level."""
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message)), format="{level} {message}", level="DEBUG")
    yield lines
    logger.remove(sink)
