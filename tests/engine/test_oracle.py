"""SmolLM2's Q4_1 file against float64 (transformers on torch), per scored target: oracle/smollm2-nll.npz."""

from __future__ import annotations

import numpy as np
import pytest

import engine

WINDOW = 512


@pytest.fixture(scope="module")
def oracle(shared_data):
    stored = np.load(shared_data / "oracle" / "smollm2-nll.npz")
    return stored["tokens"].reshape(-1, WINDOW), stored["nll_float64"].reshape(-1, 255)


def test_every_target_equals_float64(smollm2, oracle):
    """Within 2e-4 nats a target and 5e-6 in ln PPL; torch's own float32 is within 3.4e-5 a target."""
    tokens, expected = oracle[0][:8], oracle[1]
    targets = np.full_like(tokens, -1)
    targets[:, 256:511] = tokens[:, 257:]
    with engine.open(smollm2) as file:
        model = engine.load_model(file, threads=2)
        batch = engine.Batch(
            tokens.ravel(),
            np.tile(np.arange(WINDOW), 8),
            np.repeat(np.arange(8), WINDOW),
            targets=targets.ravel(),
        )
        nll = model.nll(batch, model.new_cache(8, WINDOW)).reshape(8, 255)
    assert np.abs(nll - expected).max() < 2e-4
    assert abs(nll.mean() - expected.mean()) < 5e-6
    assert abs(nll.mean() - np.log(24.497366)) < 5e-6
