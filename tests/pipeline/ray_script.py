"""Scripts that tests of Ray start, and the environment that they need."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def script_environment() -> dict[str, str]:
    """Of a script of these tests, run from the checkout."""
    paths = f"{ROOT}:{ROOT / 'tests'}"
    return {**os.environ, "PYTHONPATH": paths}
