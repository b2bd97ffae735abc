"""A server of models, and fsspec's file system in memory."""

import threading

import fsspec
import pytest

from pipeline import fetch
from tests.pipeline.model_server import Server


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetch, "PAUSE_S", 0.01)
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty again afterwards."""
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)
