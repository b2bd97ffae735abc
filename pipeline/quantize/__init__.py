"""Full-precision GGUF files in, files of any quantized type out, byte for byte as llama-quantize makes them.

settings.py  types.py    what a user can ask for, and what is said of the rest
mixtures.py              which tensor gets which type
imatrix_file.py          how much each column counts
plan.py                  what becomes of every tensor, checked before the work
stream.py                rows decoded, checked and encoded, in order
job.py                   all of it
"""

from __future__ import annotations

from typing import Any

from pipeline.quantize.settings import QuantizeSettings


def quantize(settings: QuantizeSettings) -> dict[str, Any]:
    """Quantizes a model and returns the job's keys (contract.md 5); see `job.run`, which this imports."""
    from pipeline.quantize import job

    return job.run(settings)
