"""The process that MLflow lives in, as the driver sees it: started, asked, let go.

Importing MLflow takes seconds and a fresh SQLite schema several more, and it brings its memory, its prints
and its time-outs: all that stays in a child (`python -m pipeline.tracking`), which reads messages from its
standard input, a line of JSON each, and answers each with a line. What is asked is in tracking.py.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from pipeline.settings import TrackingSettings

TIMEOUT_S = 120.0


class Unanswered(Exception):
    """The process cannot be started, is gone, did not answer in time, or cannot use its tracking URI."""


def local_uri(results: Path) -> str:
    """The database of tracking=local."""
    return f"sqlite:///{results.absolute() / 'mlflow.db'}"


def server_uri(settings: TrackingSettings) -> str:
    """The address of tracking=server, "" where none is given."""
    return settings.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""


class MlflowProcess:
    """MLflow at a tracking URI.

    Args:
        artifacts: folder for the artifacts of an experiment that is new; None leaves it to the server.
    """

    def __init__(self, uri: str, experiment: str, artifacts: Path | None = None) -> None:
        self._target = {
            "uri": uri,
            "experiment": experiment,
            "artifacts": artifacts.as_uri() if artifacts else None,
        }
        self._folder = artifacts.parent if artifacts else None
        self._child: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Begin what takes long, in the background.

        Raises:
            Unanswered: the process cannot be started, or its folder not be made.
        """
        if self._child is not None:
            return
        try:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            root = str(Path(__file__).resolve().parent.parent)
            path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
            self._child = subprocess.Popen(
                [sys.executable, "-m", "pipeline.tracking"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
            )
            send(self._child.stdin, self._target)
        except OSError as error:
            raise Unanswered(str(error)) from error

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Send a message and wait for its answer; `error` in it says what MLflow did not do.

        Raises:
            Unanswered: there is none; the process was ended.
        """
        self.start()
        child = self._child
        assert child is not None, "started above"
        assert child.stdout is not None, "the child was started with pipes"
        try:
            send(child.stdin, message)
            answered, _, _ = select.select([child.stdout], [], [], TIMEOUT_S)
            answer = child.stdout.readline() if answered else None
        except (OSError, ValueError) as error:  # ValueError: closed meanwhile, after an interrupt
            self._kill()
            raise Unanswered(str(error)) from error
        if answer is None:
            self._kill()
            raise Unanswered(f"no answer within {TIMEOUT_S:.0f} s")
        said: dict[str, Any] = json.loads(answer) if answer.strip() else {"fatal": "its process ended early"}
        if "fatal" in said:
            self._kill()
            raise Unanswered(said["fatal"])
        return said

    def dismiss(self) -> None:
        """Let the process end, and wait for it: it has nothing left to do."""
        child, self._child = self._child, None
        if child is None:
            return
        try:
            child.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()

    def close(self) -> None:
        """Let go without waiting."""
        child, self._child = self._child, None
        if child is not None:
            # Not killed: it may be in the middle of creating the database. It ends when its input does.
            threading.Thread(target=child.communicate, daemon=True).start()

    def _kill(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()


def send(stream: IO[str] | None, message: Mapping[str, Any]) -> None:
    """Write a message as a line.

    Raises:
        OSError: nobody reads it any more.
    """
    assert stream is not None, "the child was started with pipes"
    stream.write(json.dumps(message) + "\n")
    stream.flush()
