"""`docs/protocol.md` is normative: both sides must read every JSON block of it, whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter

from rvmcv_worker import protocol
from rvmcv_worker.answers import FENCED_REASONS, error_of
from rvmcv_worker.errors import CODES, FencedError, from_code

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
BLOCKS: list[dict[str, Any]] = [
    json.loads(text) for text in re.findall(r"^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
]


def kind_of(block: dict[str, Any]) -> str:
    """Recognise a block by its keys."""
    keys = set(block)
    if "event" in keys:
        return str(block["event"])
    if "data" in keys:
        return "dataset" if "download_url" in block["data"] else "uploaded model"
    marks = {
        "jobs offered": {"jobs"},
        "claimed": {"lease_token", "attempt"},
        "refused": {"reason"},
        "directive": {"directive"},
        "accepted": {"accepted"},
        "worker status": {"worker_id", "state"},
        "orders": {"leases", "desired_state"},
        "uploads wanted": {"files"},
        "uploads": {"uploads"},
        "stored model": {"file_path", "sha256_hash"},
        "training complete": {"training_job_id", "error_message"},
    }
    (kind,) = [
        kind for kind, mark in marks.items() if mark <= keys and (kind != "jobs offered" or len(keys) == 1)
    ]
    return kind


KINDS = [kind_of(block) for block in BLOCKS]
BY_KIND = pytest.mark.parametrize(("kind", "block"), list(zip(KINDS, BLOCKS, strict=True)), ids=KINDS)

SENT: dict[str, type[protocol.Sent]] = {
    "claim": protocol.ClaimRequest,
    "progress": protocol.ProgressReport,
    "finish": protocol.FinishReport,
    "worker status": protocol.WorkerStatus,
    "uploads wanted": protocol.UploadRequest,
    "stored model": protocol.StoredModelUpload,
    "training complete": protocol.TrainingComplete,
}
ANSWERED: dict[str, type[protocol.Answered]] = {
    "claimed": protocol.Claim,
    "directive": protocol.ProgressAnswer,
    "accepted": protocol.FinishAnswer,
    "orders": protocol.WorkerStatusAnswer,
    "uploads": protocol.UploadSlots,
}
DATA: dict[str, type[protocol.Answered]] = {
    "dataset": protocol.DatasetInfo,
    "uploaded model": protocol.UploadedModel,
}


def understood(body: BaseModel) -> Any:
    """What a model read of a block, without what the block did not say."""
    return body.model_dump(mode="json", exclude_unset=True)


def read_by_worker(kind: str, block: dict[str, Any]) -> Any:
    """Return the block as the worker understands it."""
    text = protocol.encode(block)
    body = protocol.parse_json(text)
    if kind == "jobs offered":
        return {
            "jobs": [
                understood(job) for job in protocol.parse_offers(body) if isinstance(job, protocol.JobOffer)
            ]
        }
    if kind == "refused":
        fenced = error_of("POST /x", 409, {}, text, sent_bytes=0, secrets=(), fencing=True)
        assert isinstance(fenced, FencedError)
        return {**body, "reason": fenced.reason}
    if kind in DATA:
        return {**body, "data": understood(protocol.parse(DATA[kind], body["data"]))}
    return understood(protocol.parse(SENT.get(kind) or ANSWERED[kind], body))


def test_every_message_is_on_the_page() -> None:
    assert set(KINDS) == {"jobs offered", "refused", *SENT, *ANSWERED, *DATA}


@BY_KIND
def test_worker_reads_the_whole_block(kind: str, block: dict[str, Any]) -> None:
    assert read_by_worker(kind, block) == block


@pytest.mark.parametrize("kind", sorted(SENT))
def test_worker_sends_what_the_page_shows(kind: str) -> None:
    block = BLOCKS[KINDS.index(kind)]
    sent = json.loads(protocol.encode(SENT[kind].model_validate(block)))
    shown = {key: value for key, value in block.items() if value is not None}
    assert {key: value for key, value in sent.items() if value or key in shown} == shown


@BY_KIND
def test_reference_server_reads_the_block(kind: str, block: dict[str, Any]) -> None:
    wire = pytest.importorskip("rvmcv_worker.reference.wire")
    readers: dict[str, Callable[[Any], Any]] = {
        "jobs offered": wire.Offers.model_validate,
        "claimed": wire.Claimed.model_validate,
        "refused": wire.Refusal.model_validate,
        "directive": wire.Directive.model_validate,
        "accepted": wire.Accepted.model_validate,
        "worker status": wire.WorkerStatus.model_validate,
        "orders": wire.WorkerOrders.model_validate,
        "uploads wanted": wire.UploadsWanted.model_validate,
        "uploads": wire.Uploads.model_validate,
        "stored model": wire.StoredModelUpload.model_validate,
        "training complete": wire.TrainingComplete.model_validate,
        **dict.fromkeys(("claim", "progress", "finish"), TypeAdapter(wire.JobEvent).validate_python),
    }
    for name, model in (("dataset", "DatasetShown"), ("uploaded model", "StoredModel")):
        if hasattr(wire, model):
            readers[name] = getattr(wire, model).model_validate
    if kind not in readers:
        pytest.skip(f"the reference server has no model of: {kind}")
    read = readers[kind](block)
    assert read.model_dump(mode="json", exclude_unset=True) == block


def test_reasons_of_the_page_are_those_that_fence() -> None:
    (row,) = re.findall(r"^\| 404 or 409 whose JSON has `reason` \((.*?)\)", PAGE, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == FENCED_REASONS


def test_error_codes_of_the_page_are_those_of_the_code() -> None:
    table = PAGE.split("## 9. Error codes")[1]
    told: dict[str, bool] = {}
    for names, handed_back in re.findall(r"^\| (`.*?) \| (.*?) \|", table, re.MULTILINE):
        codes = re.findall(r"`(\w+)`", names)
        words = [word.startswith("yes") for word in re.findall(r"\b(?:yes|no)\b", handed_back)]
        told |= dict(zip(codes, words if len(words) == len(codes) else words[:1] * len(codes), strict=True))
    assert told == {code: from_code(code, "").handed_back for code in CODES}
