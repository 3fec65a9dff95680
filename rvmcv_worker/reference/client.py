"""The command line's end of the HTTP API."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests

#: Seconds to connect, and between two bytes of an answer.
TIMEOUTS_S = (5, 300)


class ClientError(Exception):
    """The server could not be reached, or refused; the message is for people."""


class Client:
    """Calls with an admin's token."""

    def __init__(self, url: str, token: str) -> None:
        self._url = url.rstrip("/")
        self._session = requests.Session()
        # A .netrc or a proxy variable must not change who gets the token.
        self._session.trust_env = False
        self._session.headers.update({"Authorization": f"Bearer {token}", "Accept": "application/json"})

    @staticmethod
    def parse(value: str) -> Any:
        """Return a value that was typed: JSON where it is JSON, else the text."""
        try:
            return json.loads(value, parse_constant=_refuse)
        except ValueError:
            return value

    def get(self, path: str) -> Any:
        """Return what lies there."""
        return self._call("GET", path)

    def post(self, path: str, body: dict[str, Any] | None) -> Any:
        """Send a body without its empty fields."""
        filled = None if body is None else {key: value for key, value in body.items() if value is not None}
        return self._call("POST", path, json=filled)

    def cancel(self, job_id: str) -> Any:
        """Cancel a job, or every job of a batch."""
        kind = "batch" if _is_batch(job_id) else "job"
        return self._call("DELETE", f"/api/v1/cv/{kind}/{quote(job_id, safe='')}/cancel")

    def result(self, job_id: str, wait_s: float) -> Any:
        """Look at an inference, a shard or a batch again."""
        name = quote(job_id, safe="")
        path = f"batch/{name}" if _is_batch(job_id) else f"inference/{name}?wait={wait_s}"
        return self._call("GET", f"/api/v1/cv/{path}")

    def upload_dataset(self, file: Path) -> Any:
        """Store a data set's archive."""
        with file.open("rb") as source:
            form = {"data": {"name": file.stem}, "files": {"file": (file.name, source)}}
            return self._call("POST", "/api/v1/cv/datasets", **form)

    def upload_model(self, file: Path, model_name: str, version: str) -> Any:
        """Store a model that is usable at once."""
        with file.open("rb") as source:
            form = {
                "data": {"model_name": model_name, "version": version},
                "files": {"model_file": (file.name, source)},
            }
            return self._call("POST", "/api/v1/cv/upload-model", **form)

    def upload_image(self, file: Path, fields: dict[str, Any], wait_s: float) -> Any:
        """Ask for an inference on an image that the server does not have yet."""
        with file.open("rb") as source:
            form = {"data": _texts(fields), "files": {"image": (file.name, source)}}
            return self._call("POST", f"/api/v1/cv/playground-inference?wait={wait_s}", **form)

    def upload_manifest(self, file: Path, fields: dict[str, Any]) -> Any:
        """Queue a batch of the images in a list that the server does not have yet."""
        with file.open("rb") as source:
            form = {"data": _texts(fields), "files": {"manifest": (file.name, source)}}
            return self._call("POST", "/api/v1/cv/batch-inference", **form)

    def _call(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            answer = self._session.request(
                method, self._url + path, timeout=TIMEOUTS_S, allow_redirects=False, **arguments
            )
        except requests.RequestException as error:
            raise ClientError(f"{self._url} cannot be reached ({type(error).__name__})") from None
        try:
            body = answer.json()
        except requests.JSONDecodeError:
            raise ClientError(f"{self._url}{path} answered {answer.status_code}, not with JSON") from None
        if not answer.ok:
            raise ClientError(f"{self._url}{path} answered {answer.status_code}: {body.get('message', body)}")
        return body


def _is_batch(job_id: str) -> bool:
    """Whether an id is a batch's: that of a shard has a number behind it."""
    return re.fullmatch(r"batch_\d{8}_\d{6}_[0-9a-f]{8}", job_id) is not None


def _texts(fields: dict[str, Any]) -> dict[str, str]:
    """Return fields as a form has them."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in fields.items()
        if value is not None
    }


def _refuse(word: str) -> Any:
    """Python's parser takes NaN and Infinity, which are no JSON and cannot be sent."""
    raise ValueError(f"{word} is no JSON")
