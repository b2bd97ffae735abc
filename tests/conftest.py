"""Fixtures that every part of the tests shares, and the environment of Ray, MLflow and Hypothesis in here."""

from __future__ import annotations

import fcntl
import functools
import json
import logging
import os
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, but all files that start Ray go to one process: one cluster at a time."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if _starts_ray(config.rootpath / file) else file

    return ByFile(config, log)


@functools.cache
def _starts_ray(file: Path) -> bool:
    return "mark.ray" in file.read_text()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Where tests run side by side, one that is marked `alone` waits for the others, and they for it."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    folder = Path(item.config.option.basetemp).parent  # of all processes of this run
    with (folder / "door").open("w") as door, (folder / "room").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)  # none goes in while one waits for the room to be empty
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)  # also of children that were forked and have it open


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


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """Takes away what a command line did to logging."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    exit_code: int
    line: dict[str, Any]
    stdout: str
    stderr: str


@pytest.fixture
def pagemill(
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    logging_as_it_was: None,
) -> Callable[..., Answer]:
    """Run a command line in this process, in an empty folder."""
    from jobs import cli

    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Answer:
        capfd.readouterr()
        exit_code = cli.execute(words[0], words[1:])
        out, err = capfd.readouterr()
        return Answer(exit_code, json.loads(out.splitlines()[-1]), out, err)

    return run
