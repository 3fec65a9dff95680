"""Secrets and signatures are cut out of whatever text the worker shows or tells."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import requests
import urllib3
from loguru import logger
from minio import Minio

from rvmcv_worker import final_report, log_output, logs
from rvmcv_worker.answers import excerpt
from rvmcv_worker.child_log import ChildLog
from rvmcv_worker.config import Settings
from rvmcv_worker.errors import DatasetInvalidError
from rvmcv_worker.events import Event, event
from rvmcv_worker.state import Condition
from tests.journal_socket import JournalSocket, under_systemd

SECRET = "12|canary/Zq8+redaction="
SIGNED = "http://127.0.0.1:9/datasets/a.zip?X-Amz-Credential=me%2Fus&X-Amz-Signature=canary-Zq8"


@pytest.fixture(autouse=True)
def masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_secrets", set())
    logs.mask(SECRET)


@pytest.mark.parametrize(
    "text",
    [
        f"it said {SECRET}.",
        f"{SECRET}{SECRET}",
        "as a URL has it: 12%7Ccanary%2FZq8%2Bredaction%3D",
        "as another has it: 12%7ccanary%2fZq8%2bredaction%3d",
        '{"token": "12|canary\\/Zq8+redaction="}',
        "without its number: canary/Zq8+redaction=",
        "without its number: canary%2fZq8%2bredaction%3d",
        f"GET {SIGNED} failed",
        f"'{SIGNED}'",
        "Max retries exceeded with url: /datasets/a.zip?X-Amz-Signature=canary-Zq8 (Caused by …)",
        "next=http%3A%2F%2Fminio%2Fa%3FX-Amz-Signature%3Dcanary-Zq8",
        "a.zip&X-Amz-Signature=canary-Zq8&x=1",
        "AWS4-HMAC-SHA256 Credential=canary-Zq8/20260109, Signature=canary-Zq8",
        "Authorization: Bearer another-token-canary-Zq8",
        "Authorization: Basic dXNlcjpjYW5hcnktWnE4canary-Zq8",
        "https://me:canary-Zq8@minio/a",
        "https://minio/a?token=canary-Zq8#x",
        "x-amz-security-token=canary-Zq8",
    ],
)
def test_no_form_of_a_secret_stays(text: str) -> None:
    shown = logs.redact(text)
    assert "Zq8" not in shown
    assert logs.redact(shown) == shown
    assert "Zq8" not in excerpt(text.encode())


@pytest.mark.parametrize(
    "text",
    [
        "images/train/0001.jpg: line 3: class 7 is not in names",
        "the model says 0.92? no",
        "is this really an S3 endpoint?",
        "https://minio:9000/models/cv/job/attempt-1/best.pt",
        "basic checks passed, bearer of bad news",
        "a@b.example wrote it",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert logs.redact(text) == text


def test_a_secret_that_holds_another_goes_whole() -> None:
    logs.mask("canary", "canary-Zq8-and-more")
    assert logs.redact("it is canary-Zq8-and-more, canary") == "it is ********, ********"


def test_exceptions_of_the_http_libraries_are_logged_without_the_query(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    pool = urllib3.PoolManager(retries=urllib3.Retry(total=False), timeout=1)
    client = Minio(
        "127.0.0.1:9", "canary-Zq8", "canary-Zq8", secure=False, http_client=pool, region="us-east-1"
    )
    said = []
    log_output.configure("DEBUG")
    for attempt in (
        lambda: requests.get(SIGNED, headers={"Authorization": f"Bearer {SECRET}"}, timeout=1),
        lambda: urllib3.PoolManager().request("GET", SIGNED, retries=False, timeout=1),
        lambda: client.get_object("datasets", "a.zip", request_headers={"x": SECRET}),
    ):
        try:
            attempt()
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            logger.exception("it broke: {}", error)
            said.append(str(error))
    logger.remove()
    printed = capsys.readouterr().err
    assert printed.count("Traceback (most recent call last)") >= len(said) == 3
    assert "Zq8" in "".join(said), "there was something to hide"
    assert "Zq8" not in printed


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_field_of_a_journal_holds_a_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log_format: Literal["text", "json"]
) -> None:
    with (
        JournalSocket(tmp_path / "socket") as journal,
        under_systemd(monkeypatch, tmp_path, tmp_path / "socket"),
    ):
        log_output.configure("DEBUG", log_format)
        try:
            raise ValueError(SECRET)
        except ValueError:
            event(Event.JOB_FAILED, SECRET, url=SIGNED).exception("it said {}", SECRET)
        logger.remove()
        (entry,) = journal.entries()
    assert "Zq8" not in str(entry)
    assert entry["RVMCV_JOB_ID"] == "********"
    assert entry["RVMCV_URL"] == "http://127.0.0.1:9/datasets/a.zip?…"


def test_tracebacks_are_without_the_values_of_variables(capsys: pytest.CaptureFixture[str]) -> None:
    log_output.configure("DEBUG")
    unknown = "canary-of-a-variable"
    try:
        raise ValueError(len(unknown))
    except ValueError as error:
        logger.exception("broke")
        log_output.log_uncaught(type(error), error, error.__traceback__)
    logger.remove()
    printed = capsys.readouterr().err
    assert printed.count("ValueError: 20") == 2
    # The source line names it; its value is not told.
    assert printed.count("canary-of-a-variable") == 0


def test_a_childs_log_a_report_and_a_reason_are_masked(tmp_path: Path) -> None:
    log = ChildLog(tmp_path / "train.log", 10_000)
    log.feed(f"found {SECRET} and {SIGNED}\n".encode())
    log.close()
    condition = Condition()
    condition.degrade("server", f"{SIGNED} said {SECRET}")
    error = DatasetInvalidError(
        f"{SIGNED}: {SECRET}", detail={"faults": [{"where": SIGNED, SECRET: [SECRET]}]}
    )
    report = final_report.failure(error, Settings())
    shown = f"{(tmp_path / 'train.log').read_text()} {log.tail} {condition.reasons()} {report}"
    assert "Zq8" not in shown
    assert shown.count("http://127.0.0.1:9/datasets/a.zip?…") == 5
