"""Checks AWS Signature Version 4 as S3 does, with botocore's own signer.

moto accepts any key and any expired URL; tests that pass against it alone prove nothing.
"""

from __future__ import annotations

import calendar
import hmac
import re
import time
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit, urlunsplit

from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

#: How far a request's time may be off, as at AWS.
SKEW_LIMIT_S = 15 * 60
_AUTHORIZATION = re.compile(
    r"^AWS4-HMAC-SHA256 Credential=(?P<credential>[^,]+),\s*"
    r"SignedHeaders=(?P<headers>[^,]+),\s*Signature=(?P<signature>[0-9a-f]{64})$"
)


class SignatureError(Exception):
    """The request is refused with this S3 error code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class SignedRequest:
    """A request as it came over the wire, headers with lower-case names."""

    method: str
    url: str
    headers: dict[str, str]


@dataclass(frozen=True)
class SignatureCheck:
    """Admits requests that were signed with one pair of keys and are not stale."""

    access_key: str
    secret_key: str

    def check(self, request: SignedRequest, now: float) -> None:
        """Raise `SignatureError` unless the request is signed, by us, and in time."""
        query = parse_qs(urlsplit(request.url).query, keep_blank_values=True)
        if "X-Amz-Signature" in query:
            self._check_query(request, {key: values[0] for key, values in query.items()}, now)
        else:
            self._check_header(request, now)

    def _check_header(self, request: SignedRequest, now: float) -> None:
        found = _AUTHORIZATION.match(request.headers.get("authorization", ""))
        if found is None:
            raise SignatureError("AccessDenied", "the request is not signed with AWS4-HMAC-SHA256")
        stamp = request.headers.get("x-amz-date", "")
        if abs(now - _seconds(stamp)) > SKEW_LIMIT_S:
            raise SignatureError("RequestTimeTooSkewed", "the request's time is too far from the server's")
        names = found["headers"].split(";")
        if "host" not in names or "x-amz-date" not in names:
            raise SignatureError("AccessDenied", "host and x-amz-date must be signed")
        self._compare(S3SigV4Auth, request, found["credential"], names, stamp, found["signature"])

    def _check_query(self, request: SignedRequest, query: dict[str, str], now: float) -> None:
        try:
            credential, names = query["X-Amz-Credential"], query["X-Amz-SignedHeaders"].split(";")
            stamp, expires_s = query["X-Amz-Date"], int(query["X-Amz-Expires"])
        except (KeyError, ValueError) as error:
            raise SignatureError("AuthorizationQueryParametersError", f"bad or missing {error}") from None
        if "host" not in names:
            raise SignatureError("AccessDenied", "host must be signed")
        signed_at = _seconds(stamp)
        if now > signed_at + expires_s or signed_at > now + SKEW_LIMIT_S:
            raise SignatureError("AccessDenied", "Request has expired")
        parts = urlsplit(request.url)
        unsigned = "&".join(
            pair for pair in parts.query.split("&") if not pair.startswith("X-Amz-Signature=")
        )
        bare = SignedRequest(
            request.method, urlunsplit(parts._replace(query=unsigned)), _without_digest(request.headers)
        )
        self._compare(S3SigV4QueryAuth, bare, credential, names, stamp, query["X-Amz-Signature"])

    def _compare(
        self,
        signer: type[S3SigV4Auth | S3SigV4QueryAuth],
        request: SignedRequest,
        credential: str,
        names: list[str],
        stamp: str,
        signature: str,
    ) -> None:
        scope = credential.split("/")
        if len(scope) != 5 or scope[3:] != ["s3", "aws4_request"] or scope[1] != stamp[:8]:
            raise SignatureError("AuthorizationHeaderMalformed", "the credential's scope is not one of S3's")
        if not hmac.compare_digest(scope[0], self.access_key):
            raise SignatureError("InvalidAccessKeyId", "the access key does not exist")
        headers = {name: request.headers.get(name, "") for name in names}
        # Part of what is signed even where its header is not.
        if "x-amz-content-sha256" in request.headers:
            headers["x-amz-content-sha256"] = request.headers["x-amz-content-sha256"]
        auth = signer(Credentials(self.access_key, self.secret_key), "s3", scope[2])
        aws = AWSRequest(method=request.method, url=request.url, headers=headers)
        aws.context["timestamp"] = stamp
        expected = auth.signature(auth.string_to_sign(aws, auth.canonical_request(aws)), aws)
        if not hmac.compare_digest(expected, signature):
            raise SignatureError("SignatureDoesNotMatch", "the signature is not that of this secret key")


def _seconds(stamp: str) -> float:
    try:
        return float(calendar.timegm(time.strptime(stamp, "%Y%m%dT%H%M%SZ")))
    except ValueError:
        raise SignatureError("AccessDenied", "x-amz-date is missing or malformed") from None


def _without_digest(headers: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name != "x-amz-content-sha256"}
