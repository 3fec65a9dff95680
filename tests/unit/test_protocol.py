"""The worker's models of the wire: what they refuse, and what they make of rubbish."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from rvmcv_worker import protocol

OFFER: dict[str, Any] = {"job_id": "job-1", "id": 17, "job_type": "yolo11", "config": {}}
LEASE = {"job_id": "job-1", "lease_token": "lease"}
FINISH = {**LEASE, "finish_id": "d7a8fbb3-07d7-4099-8e3c-6a1f6a2c9b50"}


@pytest.mark.parametrize(
    "job_id", ["../x", "a/b", ".hidden", "-rf", "a\0b", "a\n", "a b", "", "ü", "x" * 129, "x" * 4096]
)
def test_hostile_job_id_is_refused_and_can_be_reported(job_id: str) -> None:
    (job,) = protocol.parse_offers({"jobs": [{**OFFER, "job_id": job_id}]})
    assert isinstance(job, protocol.MalformedJob)
    assert job.job_id == (job_id or None)
    assert job.reason.startswith("job_id: ")
    assert len(job.reason) < 300


@pytest.mark.parametrize("job_id", [None, 7, ["x"], "x" * 9000])
def test_job_id_that_cannot_be_reported(job_id: Any) -> None:
    (job,) = protocol.parse_offers({"jobs": [{**OFFER, "job_id": job_id}]})
    assert isinstance(job, protocol.MalformedJob)
    assert job.job_id is None


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"id": "17"}, "id"),
        ({"id": -1}, "id"),
        ({"id": True}, "id"),
        ({"config": []}, "config"),
        ({"config": None}, "config"),
        ({"job_type": "../yolo"}, "job_type"),
        ({"priority": "high"}, "priority"),
    ],
)
def test_malformed_offer_names_the_field_and_keeps_the_others(change: dict[str, Any], key: str) -> None:
    malformed, good = protocol.parse_offers({"jobs": [{**OFFER, **change}, OFFER]})
    assert isinstance(malformed, protocol.MalformedJob)
    assert (malformed.job_id, malformed.reason.split(":")[0]) == ("job-1", key)
    assert isinstance(good, protocol.JobOffer)


@pytest.mark.parametrize("body", [{}, {"jobs": None}, {"jobs": {}}])
def test_offer_without_a_list_of_jobs(body: dict[str, Any]) -> None:
    with pytest.raises(protocol.AnswerError, match="jobs"):
        protocol.parse_offers(body)


@pytest.mark.parametrize(
    "text",
    [b"", b"<html>", b"[]", b"{", b"[" * 100_000, b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", b'"\xff"', b"\0"],
)
def test_answer_that_is_no_bounded_object(text: bytes) -> None:
    with pytest.raises(protocol.AnswerError):
        protocol.parse_json(text)


def test_answer_over_the_cap() -> None:
    with pytest.raises(protocol.AnswerError, match="longer"):
        protocol.parse_json(b'{"a": "' + b"x" * protocol.MAX_ANSWER_BYTES + b'"}')


@pytest.mark.parametrize(
    "change",
    [{"lease_s": 0}, {"lease_s": "60"}, {"attempt": 0}, {"lease_token": ""}, {"lease_s": float("inf")}],
)
def test_claim_that_cannot_be_used(change: dict[str, Any]) -> None:
    claim = {"lease_token": "x", "attempt": 1, "lease_s": 60, "report_interval_s": 2}
    assert protocol.parse(protocol.Claim, claim).attempt == 1
    with pytest.raises(protocol.AnswerError, match=next(iter(change))):
        protocol.parse(protocol.Claim, {**claim, **change})


@pytest.mark.parametrize(
    "resume",
    [{}, "x", {"sha256": "0" * 64}, {"path": "s3://a/b", "sha256": "no"}, {"path": 5, "sha256": "0" * 64}],
)
def test_unreadable_resume_is_none(resume: Any) -> None:
    claim = protocol.parse(
        protocol.Claim, {"lease_token": "x", "attempt": 2, "lease_s": 60, "resume": resume}
    )
    assert claim.resume is None


def test_what_a_child_reports_wrongly_is_left_out() -> None:
    progress = protocol.progress_of(
        {
            "fraction": 1.5,
            "phase": "sing",
            "epoch": 3,
            "losses": {"box": float("nan")},
            "history": [{"epoch": 3, "lr": float("inf")}],
            "message": "x" * 3000 + "end",
            "lease_token": "not a child's to set",
        }
    )
    wire = protocol.to_wire(progress)
    assert wire.pop("message") == "x" * 1997 + "end"
    assert wire == {"epoch": 3, "losses": {"box": None}, "history": [{"epoch": 3, "lr": None}]}


def test_numbers_that_are_not_finite_are_null_and_text_is_storable() -> None:
    text = protocol.encode({"a": [float("nan"), {"b": float("-inf")}], "c\0": "\ud800x", "d": 1.5})
    assert json.loads(text) == {"a": [None, {"b": None}], "c\ufffd": "?x", "d": 1.5}


def test_form_fields_of_a_model() -> None:
    upload = protocol.ModelUpload(
        model_name="yolo11", version="v1-a1", metrics={"mAP50": 0.5}, training_job_id=17, lease_token="l"
    )
    assert protocol.multipart_fields(upload) == {
        "model_name": "yolo11",
        "version": "v1-a1",
        "metrics": '{"mAP50": 0.5}',
        "training_job_id": "17",
        "lease_token": "l",
    }


@pytest.mark.parametrize("version", ["", "-a1", "a/b", "x" * 51, "0" * 64])
def test_version_that_no_server_takes(version: str) -> None:
    with pytest.raises(ValidationError):
        protocol.ModelUpload(
            model_name="yolo11", version=version, metrics={}, training_job_id=17, lease_token="l"
        )


@pytest.mark.parametrize(
    "body",
    [
        {"status": "completed"},
        {"status": "failed"},
        {"status": "queued"},
        {"status": "failed", "error": {"code": "internal", "message": ""}, "retry_after_s": 5},
        {"status": "done", "result": {}},
        {"status": "cancelled", "reason": "x"},
    ],
)
def test_finish_that_says_too_little_or_too_much(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        protocol.FinishReport.model_validate({**FINISH, **body})


def test_long_error_keeps_its_end() -> None:
    message = "x" * 30_000 + "the reason"
    error = protocol.WireError(code="job_crashed", message=message)
    assert (len(error.message), error.message[-10:]) == (protocol.MAX_ERROR_CHARS, "the reason")


def test_models_are_frozen_and_hide_values() -> None:
    offer = protocol.JobOffer.model_validate(OFFER)
    with pytest.raises(ValidationError):
        offer.job_type = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError) as caught:
        protocol.LeaseRef.model_validate({"job_id": "x", "lease_token": ["secret"]})
    assert "secret" not in str(caught.value)
    claim = {"lease_token": "secret", "attempt": 1, "lease_s": 60}
    assert "secret" not in repr(protocol.parse(protocol.Claim, claim))
    slot = {"url": "https://minio/x?secret", "path": "s3://x/y"}
    assert "secret" not in repr(protocol.parse(protocol.UploadSlot, slot))


@pytest.mark.parametrize(
    "changed",
    [
        {"attempt": 2**63},
        {"attempt": 10**400},
        {"lease_s": 1e10},
        {"report_interval_s": 1e308},
        {"report_interval_s": -1},
        {"lease_s": 0},
    ],
)
def test_numbers_that_no_database_or_clock_takes_are_refused(changed: dict[str, Any]) -> None:
    good = {"lease_token": "t", "attempt": 2**63 - 1, "lease_s": 1e9, "report_interval_s": 0}
    assert protocol.parse(protocol.Claim, good).attempt == 2**63 - 1
    with pytest.raises(protocol.AnswerError, match=next(iter(changed))):
        protocol.parse(protocol.Claim, {**good, **changed})
