"""Which URLs of a job are followed, and what each of them is taken for."""

from __future__ import annotations

import pytest

from rvmcv_worker.config import ServerSettings, Settings, StorageSettings
from rvmcv_worker.errors import UrlForbiddenError
from rvmcv_worker.urls import HttpsUrl, S3Url, ServerPath, classify, shown, without_token

SETTINGS = Settings(
    server=ServerSettings(url="https://rvm-server.test"),
    storage=StorageSettings(
        s3_endpoint="http://minio.test:9000",
        allowed_hosts=("images.test", "deep.test:8443", "*.cdn.test", "192.0.2.7", "[2001:db8::7]"),
        plain_http_hosts=("plain.test",),
    ),
)


@pytest.mark.parametrize(
    ("url", "taken_for"),
    [
        ("s3://datasets/waste-v3.zip", S3Url("datasets", "waste-v3.zip")),
        ("S3://datasets/a/b c.zip", S3Url("datasets", "a/b c.zip")),
        ("s3://datasets/ä%2e.zip", S3Url("datasets", "ä%2e.zip")),
        ("/api/v1/cv/datasets/3/download", ServerPath("/api/v1/cv/datasets/3/download")),
        ("storage/3.zip?v=2", ServerPath("/storage/3.zip?v=2")),
        ("https://rvm-server.test/x/3.zip?v=2", ServerPath("/x/3.zip?v=2")),
        ("https://RVM-Server.test:443/x", ServerPath("/x")),
        (
            "https://images.test/a.jpg?sig=1",
            HttpsUrl("https://images.test/a.jpg?sig=1", "https", "images.test", 443),
        ),
        ("https://IMAGES.test", HttpsUrl("https://IMAGES.test", "https", "images.test", 443)),
        ("https://deep.test:8443/a", HttpsUrl("https://deep.test:8443/a", "https", "deep.test", 8443)),
        ("https://eu.cdn.test/a", HttpsUrl("https://eu.cdn.test/a", "https", "eu.cdn.test", 443)),
        (
            "http://minio.test:9000/b/k",
            HttpsUrl("http://minio.test:9000/b/k", "http", "minio.test", 9000),
        ),
        ("http://plain.test/a", HttpsUrl("http://plain.test/a", "http", "plain.test", 80)),
        ("https://192.0.2.7/a", HttpsUrl("https://192.0.2.7/a", "https", "192.0.2.7", 443)),
        ("https://[2001:db8::7]/a", HttpsUrl("https://[2001:db8::7]/a", "https", "2001:db8::7", 443)),
    ],
)
def test_allowed(url: str, taken_for: object) -> None:
    assert classify(url, SETTINGS) == taken_for


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "1 to 4096"),
        ("https://images.test/" + "a" * 5000, "1 to 4096"),
        ("https://evil.test/a", r"evil\.test is not allowed for https; .* storage\.allowed_hosts"),
        ("https://images.test:8443/a", r"images\.test:8443 .* storage\.allowed_hosts"),
        ("https://deep.test/a", r"deep\.test is not allowed"),
        ("http://images.test/a", r"images\.test is not allowed for http; .* storage\.plain_http_hosts"),
        ("http://rvm-server.test/a", r"storage\.plain_http_hosts"),
        ("https://plain.test/a", r"storage\.allowed_hosts"),
        ("https://cdn.test/a", "cdn.test is not allowed"),
        ("https://evilcdn.test/a", "evilcdn.test is not allowed"),
        ("https://images.test.evil.test/a", "is not allowed"),
        ("https://images.test./a", "no host"),
        ("https://user:pw@images.test/a", "user part"),
        ("https://images.test@evil.test/a", "user part"),
        ("https://169.254.169.254/latest/meta-data", "is not allowed"),
        ("https://2130706433/a", "is not allowed"),
        ("https://[::ffff:192.0.2.7]/a", "is not allowed"),
        ("https://[fe80::1%25eth0]/a", "no host|cannot be read"),
        ("https:///a", "no host"),
        ("https://images.test:99999/a", "host or port"),
        ("https://images.test:0/a", "host or port"),
        ("https://images.test:/a", "no host"),
        ("https://ímages.test/a", "xn--"),
        ("https://images.test\\@evil.test/a", "backslash"),
        ("https://images.test/a#@evil.test", "backslash or #"),
        ("https://images.test/a\nHost: evil", "control characters"),
        ("https://images.test/a\x00", "control characters"),
        (" https://images.test/a", "blanks"),
        ("https://images.test/a b", "%20"),
        ("https://images.test/../a", r"'\.\.'"),
        ("https://images.test/%2e%2E/a", r"'\.\.'"),
        ("https://images.test/a%2f..%2fb", r"'\.\.'"),
        ("/api/v1/cv/../../admin", r"'\.\.'"),
        ("/api/v1/cv/%0d%0aX", "encoded separators"),
        ("//evil.test/a", "neither a path"),
        ("file:///etc/passwd", "scheme 'file'"),
        ("ftp://images.test/a", "scheme 'ftp'"),
        ("gopher:x", "scheme"),
        ("s3://Bad_Bucket/k", "bucket"),
        ("s3://a..b/k", "bucket"),
        ("s3:///k", "bucket"),
        ("s3://datasets", "'.' or '..' part"),
        ("s3://datasets/", "'.' or '..' part"),
        ("s3://datasets/../other/k", "'.' or '..' part"),
        ("s3://datasets/a//b", "'.' or '..' part"),
        ("s3://datasets/a?versionId=1", "not an object's key"),
        ("s3://datasets/" + "ä" * 600, "not an object's key"),
        ("s3://datasets/a\u202eb", "not an object's key"),
        ("s3://datasets/\ud800", "not an object's key"),
    ],
)
def test_refused(url: str, says: str) -> None:
    with pytest.raises(UrlForbiddenError, match=says):
        classify(url, SETTINGS)


def test_without_storage_an_s3_url_names_the_key_to_set() -> None:
    with pytest.raises(UrlForbiddenError, match=r"set storage\.s3_endpoint"):
        classify("s3://datasets/a.zip", Settings())


def test_own_origin_over_plain_http_needs_no_entry() -> None:
    settings = Settings(server=ServerSettings(url="http://127.0.0.1:8000"))
    assert classify("http://127.0.0.1:8000/a", settings) == ServerPath("/a")


def test_neither_messages_nor_names_hold_a_signature() -> None:
    url = "https://user:secret@evil.test/a?X-Amz-Signature=secret"
    with pytest.raises(UrlForbiddenError) as caught:
        classify(url, SETTINGS)
    assert "secret" not in caught.value.message
    assert "secret" not in shown(url)
    assert "secret" not in str(classify("https://images.test/a?sig=secret", SETTINGS))
    assert "secret" not in str(classify("/a?sig=secret", SETTINGS))


def test_a_presigned_url_never_leads_to_the_api() -> None:
    assert without_token(classify("/api/v1/cv/x", SETTINGS), SETTINGS) is None
    assert without_token(classify("s3://datasets/x", SETTINGS), SETTINGS) is None
    own = without_token(classify("/minio/x?sig=1", SETTINGS), SETTINGS)
    assert own is not None
    assert (own.url, own.host, own.port) == (
        "https://rvm-server.test:443/minio/x?sig=1",
        "rvm-server.test",
        443,
    )
