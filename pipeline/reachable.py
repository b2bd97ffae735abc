"""Whether a tracking server answers: asked once and shortly, before a run depends on it."""

from __future__ import annotations

import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NoAnswer

PROBE_TIMEOUT_S = 2.0


def unreachable(uri: str) -> str | None:
    """Why a server cannot be reached, or None; bounded even where the name look-up hangs."""
    if not uri.startswith(("http://", "https://")):
        return None if uri else "tracking.uri is not set"

    def ask() -> None:
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=PROBE_TIMEOUT_S).close()
        except urllib.error.HTTPError as error:
            error.close()  # it wants a login, say: something answers, MLflow will see

    pool = ThreadPoolExecutor(1)
    try:
        pool.submit(ask).result(timeout=2 * PROBE_TIMEOUT_S)
    except NoAnswer:
        return "no answer"
    except (OSError, ValueError) as error:
        return f"not reachable ({getattr(error, 'reason', None) or error})"
    finally:
        pool.shutdown(wait=False)
    return None
