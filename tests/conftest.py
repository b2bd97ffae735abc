"""Fixtures that every part of the tests shares, and the environment of Ray, MLflow and Hypothesis in here."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports Ray or MLflow, and inherited by the processes that tests start.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray listens on 127.0.0.1 only
os.environ["RAY_AUTH_MODE"] = "token"  # read once by a process, so all tests have to have the same
os.environ["RAY_AUTH_TOKEN"] = "0" * 40  # given here, none is written into the home folder
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored, in children too
for leaked in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "PAGEMILL_DEBUG", "HYDRA_FULL_ERROR"):
    os.environ.pop(leaked, None)

# A deadline would time the first call of a jitted function, which compiles; CI repeats the same examples.
settings.register_profile("pagemill", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("pagemill")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with data/, oracle/ and models/ that PAGEMILL_TEST_DATA names."""
    folder = os.environ.get("PAGEMILL_TEST_DATA")
    if not folder:
        pytest.skip("PAGEMILL_TEST_DATA is not set: no shared data and oracles to compare with")
    return Path(folder)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct Q4_1, the file that `make model` lays down and PAGEMILL_TEST_MODEL names."""
    file = os.environ.get("PAGEMILL_TEST_MODEL")
    if not file or not Path(file).is_file():
        pytest.skip("PAGEMILL_TEST_MODEL names no file: run `make model`, or the tests by `make test`")
    return Path(file)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """An empty results folder, so that no test writes into the user's."""
    folder = tmp_path / "results"
    folder.mkdir()
    return folder
