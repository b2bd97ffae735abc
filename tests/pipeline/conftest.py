"""A Ray cluster that is not ours, which tests of several modules join."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

from tests.pipeline.ray_script import ROOT, script_environment
from tests.pipeline.s3_server import s3, s3_url  # noqa: F401


@pytest.fixture(scope="session")
def ray_head() -> Iterator[str]:
    """Address of the head of a cluster with two CPUs, in a process of its own."""
    temp_dir = tempfile.mkdtemp(prefix="pmh", dir="/tmp")
    head = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/pipeline/ray_head.py"), temp_dir],
        cwd=ROOT,
        env=script_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert head.stdout is not None
    yield head.stdout.readline().strip()
    head.communicate(timeout=30)
    shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.fixture
def address(ray_head: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Its address, for this process to join it by loopback, with its token (tests/conftest.py)."""
    monkeypatch.chdir(ROOT)  # workers import the fake one from here
    return ray_head
