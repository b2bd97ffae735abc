"""An S3-compatible store on loopback for tests: moto's server, whose buckets are gone when it ends."""

from __future__ import annotations

import logging
import urllib.request
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline import folders

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test-key",
    "AWS_SECRET_ACCESS_KEY": "not-to-be-told-to-anybody",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}


def forget_clients() -> None:
    """The next request is made with the environment as it is then."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def request_credentials(url: str, *, required: bool) -> None:
    """Have the server check credentials, which it knows none of, or take any."""
    n_free = b"0" if required else b"1000000000"
    plain = {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset-auth", n_free, plain)).close()


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """Address of the server; the test is skipped where moto or s3fs is not installed."""
    moto: Any = pytest.importorskip("moto.server", reason="moto is not installed: no store to test with")
    pytest.importorskip("s3fs", reason="s3fs is not installed: no access to object stores")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    forget_clients()
    server.stop()


@pytest.fixture
def s3(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://BUCKET/some prefix` of an empty bucket, for this process and those that it starts."""
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": s3_url}.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    folders._system().call_s3("create_bucket", Bucket=bucket)
    return f"s3://{bucket}/some prefix"
