"""Tells a webhook of every alert, in the background: at least once, in no promised order.

The table is the queue: an alert is committed with what it is about, and is sent when the webhook can be
reached, by this server or by another on the same database.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import threading

import requests
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from rvmcv_worker.reference.alerts import view_of_alert
from rvmcv_worker.reference.queue import Queue
from rvmcv_worker.reference.settings import Settings
from rvmcv_worker.reference.tables import Alert
from rvmcv_worker.reference.turn import Turn

log = logging.getLogger(__name__)


class Webhook:
    """Sends what is due, every so many seconds, from `start` until `stop`."""

    def __init__(self, queue: Queue, settings: Settings, url: str) -> None:
        self._queue = queue
        self._settings = settings
        self._url = url
        self._http = requests.Session()
        # A .netrc or a proxy variable must not change what is sent, nor where.
        self._http.trust_env = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, after the call that runs."""
        self._stopping.set()
        self._thread.join()
        self._http.close()

    def _run(self) -> None:
        while not self._stopping.wait(self._settings.timing.reap_every_s):
            try:
                while not self._stopping.is_set() and self._send_next():
                    pass
            except SQLAlchemyError:
                log.exception("alerts could not be read from the database; they are sent later")

    def _send_next(self) -> bool:
        """Send one alert that is due; False when there is none."""
        taken = self._queue.run(self._take)
        if taken is None:
            return False
        alert_id, body = taken
        error = self._post(alert_id, body)
        self._queue.run(lambda turn: self._note(turn, alert_id, error))
        return True

    def _take(self, turn: Turn) -> tuple[int, bytes] | None:
        """Choose an alert, and keep it from other servers for as long as a call may take."""
        due = select(Alert).where(Alert.send_at <= turn.now).order_by(Alert.send_at, Alert.id).limit(1)
        alert = turn.session.scalar(due.with_for_update(skip_locked=True))
        if alert is None:
            return None
        alert.tries += 1
        alert.send_at = turn.now + 3 * self._settings.timing.webhook_timeout_s
        told = view_of_alert(alert).model_dump(exclude={"webhook", "webhook_tries", "webhook_error"})
        return alert.id, json.dumps(told, ensure_ascii=False).encode()

    def _post(self, alert_id: int, body: bytes) -> str | None:
        """Call the webhook; return why it did not take the alert."""
        headers = {"Content-Type": "application/json", "X-RVM-Alert": str(alert_id)}
        if self._settings.webhook_secret is not None:
            headers["X-RVM-Signature"] = f"sha256={sign(self._settings.webhook_secret, body)}"
        try:
            answer = self._http.post(
                self._url,
                data=body,
                headers=headers,
                timeout=self._settings.timing.webhook_timeout_s,
                allow_redirects=False,
                stream=True,
            )
        except requests.RequestException as error:
            return f"cannot be reached ({type(error).__name__})"
        with answer:
            return None if 200 <= answer.status_code < 300 else f"answered {answer.status_code}"

    def _note(self, turn: Turn, alert_id: int, error: str | None) -> None:
        alert = turn.session.get_one(Alert, alert_id, with_for_update=True)
        alert.send_error = error
        timing = self._settings.timing
        if error is None:
            alert.sent_at, alert.send_at = turn.now, None
        elif turn.now - alert.created_at >= timing.webhook_give_up_s:
            alert.send_at = None
            log.error("the webhook %s: alert %d is given up; it is still in cv_alerts", error, alert_id)
        else:
            doubled_s = timing.webhook_delay_s * 2.0 ** min(alert.tries - 1, 30)
            alert.send_at = turn.now + min(doubled_s, timing.webhook_delay_limit_s)


def sign(secret: str, body: bytes) -> str:
    """Return the HMAC-SHA256 of a body, in hex."""
    return hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
