"""Messages with URLs that contain passwords, and with names that contain control characters."""

from __future__ import annotations

import pytest

from compress.errors import PacklightError, printable_line, visible, without_secrets

TOLD = {
    "s3://KEY:SECRET@bucket/model": "s3://bucket/model",
    "s3://KEY:SEC/RET+@bucket/model": "s3://bucket/model",  # slashes are usual in such keys
    "webhdfs://me:SEC@RET@host:9870/model": "webhdfs://host:9870/model",
    "https://SECRET@host/model": "https://host/model",
    "https://me:SECRET@[::1]:80/m": "https://[::1]:80/m",
    "simplecache::s3://me:SECRET@b/m": "simplecache::s3://b/m",
    "s3://b/m?X-Amz-Date=1&X-Amz-Signature=SECRET": "s3://b/m",
    "https://host/m?SECRETSECRETSECRETSECRET": "https://host/m",
    "abfs://box:SECRET@account/m": "abfs://account/m",
    "no route to 'https://me:SECRET@h/x?sig=SECRET': 404": "no route to 'https://h/x': 404",
    "url: /v1/m?op=LIST&delegation=SECRET": "url: /v1/m?op=LIST&delegation=…",
    "https://host/m?SECRET is not there": "https://host/m is not there",
    "HTTP://host/m#SECRET": "HTTP://host/m",
    "gs://b/m#SECRET": "gs://b/m",
    "s3://KEY:8080/SECRET@bucket/model": "s3://bucket/model",
    "https:/me:SECRET@host/model": "https:/host/model",  # mistyped
    "//me:SECRET@host/model": "//host/model",
    "me:SECRET@host/model": "host/model",
    "no me:SECRET@localhost here": "no localhost here",
    r"https:\\me:SECRET@host\m": r"https:\\host\m",
    "https://host/m;jsessionid=SECRET": "https://host/m;jsessionid=…",
    "a=b;AccountKey=SECRET==;c": "a=b;AccountKey=…;c",
    "token hf_SECRETsecretSECRET is no good": "token hf_… is no good",
}


@pytest.mark.parametrize(("location", "expected"), TOLD.items())
def test_a_location_is_told_without_its_secrets(location, expected):
    assert without_secrets(location) == expected
    assert PacklightError("no", location).hint == expected
    error = PacklightError(location)
    assert error.message == str(error) == expected


@pytest.mark.parametrize(
    "location",
    [
        "hf://org/model@main",
        "http://host:8080/a@b",
        "https://[::1]:80/a@b",
        "abfs://box@account.dfs.core.windows.net/m",
        "s3://bucket/llama-?b",
        "http://host: nothing there; ask a@b",
        "--set a=b",
        "llama3:8b",
        "git@host.example:a/b",
        "mail me@example.org: a@b",
        "/tmp/a:b@c/out",
        "https://host:8080/a:b@c",
        "12:30@7 a:b@c",
        "model hf_small",
    ],
)
def test_what_is_no_secret_is_told(location):
    assert without_secrets(location) == location


def test_a_line_is_visible_and_short():
    name = "\x1b]0;owned\x07\x9b31mkey\u202e\nerror: faked\ud800"
    assert printable_line(name).isprintable()
    assert visible("a\nb\tc") == "a\nb c"
    assert len(printable_line("x" * 10**5)) == 400
