"""The process environment in one place, for driver and workers: threads, Ray's switches, logging."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pipeline import events

LOG_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
CARRIED = ("NUMBA_CACHE_DIR", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "PAGEMILL_DEBUG", "PAGEMILL_LOG")
"""Variables of the driver that workers on other machines get too, where they are set."""

log = logging.getLogger(__name__)
_CHATTY = ("alembic", "mlflow", "ray", "filelock", "urllib3", "git")
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> int:
    """CPUs this process may use: its affinity, and the container's quota where there is one."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = _CGROUP_QUOTA.read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def worker_env(threads: int) -> dict[str, str]:
    """Environment of a worker with `threads` threads, to be in place before it imports Numba or NumPy.

    Numba does not look at `OMP_NUM_THREADS`, and BLAS is not on the scoring path: kernels get the threads,
    the other libraries one each.
    """
    fixed = {
        "NUMBA_NUM_THREADS": str(threads),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return fixed | {name: os.environ[name] for name in CARRIED if name in os.environ}


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process for the processes it starts meanwhile, then put the old ones back."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def prepare_local_ray() -> None:
    """Set what a Ray of our own needs before `import ray`: silence, loopback only, a token.

    Ray binds every port to all interfaces whatever address it is given; the switch meant for macOS and
    Windows is what keeps it on 127.0.0.1. The token keeps other users of this machine out; given here it is
    not left in `~/.ray`, where it would change how later clusters of this user start.
    """
    _silence_ray()
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def prepare_remote_ray() -> None:
    """Set what joining an existing cluster needs before `import ray`: silence, an authentication mode."""
    _silence_ray()
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "5")  # of 20: seconds until a wrong token is refused
    token_file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    has_token = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    has_token = has_token or token_file.exists()
    os.environ.setdefault("RAY_AUTH_MODE", "token" if has_token else "disabled")
    if os.environ["RAY_AUTH_MODE"] == "token" and not os.environ.get("RAY_AUTH_TOKEN"):
        _warn_of_readers(token_file)


def _warn_of_readers(token_file: Path) -> None:
    """Whoever reads the token can run code on the cluster as its user; Ray writes it for all to read."""
    try:
        mode = token_file.stat().st_mode & 0o777
    except OSError:
        return  # Ray says what it thinks of that
    if mode & 0o077:
        log.warning("%s can be read by others (mode %o): chmod 600 %s", token_file, mode, token_file)


def _silence_ray() -> None:
    """Ray's driver prints what nodes report (a worker died, ...) to standard output, `log_to_driver` or not.

    The filter for repeated lines is the one way to stop that; it is compiled when Ray is imported.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_DEDUP_LOGS"] = "1"
    os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = "."


class _StandardError(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to whatever `sys.stderr` is at that moment, so a live progress bar can step aside."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> object:
        return sys.stderr


def setup_logging() -> None:
    """Send every record of this process to standard error, all of them if `PAGEMILL_DEBUG=1`.

    As lines for people, or as JSON lines if `PAGEMILL_LOG=json` (pipeline/events.py). Called by the driver
    and by each worker; calling it again changes nothing. Libraries speak from WARNING on.
    """
    debug = os.environ.get("PAGEMILL_DEBUG") == "1"
    handler = _StandardError()
    if events.wants_json():
        handler.setFormatter(events.JsonLines())
    else:
        handler.setFormatter(events.Redacting(LOG_FORMAT, datefmt="%H:%M:%S"))
        if sys.stderr.isatty() and not debug:
            handler.addFilter(events.is_for_lines)
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
