from __future__ import annotations

import logging

import pytest
from loguru import logger

from rvmcv_worker import log_output, logs


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", "a\\nb"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("<0>forged", "<0>forged"),
        ("right\u202eleft", "right\\u202eleft"),
        ("bottle é", "bottle é"),
    ],
)
def test_text_from_outside_stays_one_harmless_line(text: str, shown: str) -> None:
    assert logs.escape(text) == shown


def test_secrets_and_signatures_are_never_printed() -> None:
    logs.mask("canary-token")
    text = logs.redact("Bearer canary-token to https://minio:9000/a/b?X-Amz-Signature=abc#x and https://ok/c")
    assert "canary-token" not in text
    assert "X-Amz" not in text
    assert "https://minio:9000/a/b?…" in text
    assert "https://ok/c" in text


def test_what_urllib3_says_of_broken_headers_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """It quotes the answer, and that may hold a lease token."""
    log_output.configure("INFO")
    try:
        for name in ("urllib3.connection", "a.library"):
            logging.getLogger(name).warning("unparsed data: canary-lease")
    finally:
        logger.remove()
    said = capsys.readouterr().err
    assert "a.library: unparsed data" in said
    assert "urllib3" not in said


def test_a_level_of_a_librarys_own_breaks_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    log_output.configure("INFO")
    try:
        logging.getLogger("a.library").log(35, "odd {} %s", "news")
    finally:
        logger.remove()
    assert "a.library: odd {} news" in capsys.readouterr().err
