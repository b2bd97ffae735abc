"""One score, one set of bits: any vector width, and from one release to the next."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import engine
from engine.kernel_cache import cache_dir
from tests.engine.conftest import Scorer
from tests.make_gguf import tiny_llama
from tests.make_mamba_gguf import tiny_mamba, tiny_mamba2

TOKENS = np.random.default_rng(2026).integers(0, 300, 130).astype(np.int32)

GOLDEN = {  # NUMERICS -> type -> SHA-256 of the float64 NLLs; a change of bits raises engine.NUMERICS
    1: {
        "F32": "2a4e113617f679f56e94a5751a0d70f89f4d7f3e1f0eb449c435d6f06ec131f0",
        "Q4_1": "fb3c2169a913700122caf4deb36b070ba5b4eaf08e5889f2076c20d96812a561",
        "Q4_1 int8": "02c8024a12ad824f266ee823dd637192310c4043761b85577e59af2d7b6ee387",
    },
}

MAMBA_GOLDEN = {  # the same of architectures: Mamba and FalconMamba in F32, Mamba-2 in Q8_0
    1: {
        "mamba": "0e45c000eebf1f1c961995469d729d8ed9d68270d40965af29c22aa86e5000a1",
        "falcon": "637beaae365d8a67b09b47b878ad0f8728ccb741e34822a2096fd696388f326b",
        "mamba2": "7f1bd9f04f6b538a5dd395a80984ffaffb0560511b617d8d9887eda1bc9ce388",
    },
}

MAMBAS = {
    "mamba": (tiny_mamba, {"n_state": 5, "width": 36}),
    "falcon": (tiny_mamba, {"falcon": True, "tied": False}),
    "mamba2": (tiny_mamba2, {"n_groups": 4, "type_name": "Q8_0"}),
}

AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2",
}

CHILD = """
import json, sys
from numba.core.dispatcher import Dispatcher
import engine, gc
from tests.engine.test_bits import digest
from engine.kernels.tile import LANES
digests = [digest(path, activations) for path in sys.argv[1:] for activations in ("f32", "int8")]
kernels = [k for k in gc.get_objects() if isinstance(k, Dispatcher) and k.stats.cache_misses]
assembly = "".join(k.inspect_asm(s) for k in kernels for s in k.signatures if s not in k.stats.cache_hits)
print(json.dumps({"digests": digests, "lanes": LANES, "compiled": len(kernels),
"fma": assembly.count("vfmadd"), "zmm": assembly.count("zmm")}))
"""


def digest(path, activations="f32") -> str:
    """Of the NLLs of one batch, and of the first of them again token by token."""
    whole = Scorer(path, activations=activations)
    scores = whole.score(TOKENS)
    cache = whole.model.new_cache(1, 40)
    for position, (token, target) in enumerate(itertools.pairwise(TOKENS[:40].tolist())):
        alone = whole.model.nll(engine.Batch([token], [position], targets=[target]), cache)
        assert alone[0] == scores[position]
    return hashlib.sha256(scores.tobytes()).hexdigest()


@pytest.mark.parametrize("subject", ["F32", "Q4_1", "Q4_1 int8"])
def test_bits_change_only_when_numerics_is_raised(subject, tmp_path):
    type_name, _, activations = subject.partition(" ")
    path = tiny_llama(tmp_path / "m.gguf", seed=3, type_name=type_name)
    assert digest(path, activations or "f32") == GOLDEN[engine.NUMERICS][subject], (
        "the bits of a score changed: if that is intended, raise engine.NUMERICS, write the size of the "
        "change into CHANGELOG (Numbers) and the new digest here"
    )


def mamba(folder, name):
    build, shape = MAMBAS[name]
    return build(folder / f"{name}.gguf", seed=3, **shape)


@pytest.mark.parametrize("name", MAMBAS)
def test_bits_of_mamba_change_only_when_numerics_is_raised(name, tmp_path):
    assert digest(mamba(tmp_path, name)) == MAMBA_GOLDEN[engine.NUMERICS][name], (
        "the bits of a score changed: raise engine.NUMERICS, say so in CHANGELOG (Numbers), write it here"
    )


def in_child(paths, kernels) -> dict:
    """What `CHILD` prints, with AVX2 at most, and machine code kept in a folder of its own."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, paths)],
        env=os.environ | AVX2 | {"NUMBA_CACHE_DIR": str(kernels)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.timeout(300)
def test_avx2_gives_the_same_bits_without_a_zmm_register(tmp_path):
    """Machine code that was seen to have none is kept beside the kernels: compiling takes half a minute."""
    paths = [
        tiny_llama(tmp_path / "m.gguf", seed=3, type_name="Q4_1"),
        mamba(tmp_path, "falcon"),
        mamba(tmp_path, "mamba2"),
    ]
    kept = (cache_dir() or tmp_path) / "without-zmm"
    seen = in_child(paths, kept) if kept.exists() else {"compiled": True}
    if seen["compiled"]:
        seen = in_child(paths, tmp_path / "kernels")
        assert seen["compiled"] > 20
        assert seen["fma"] > 100
        assert seen["zmm"] == 0
        shutil.copytree(tmp_path / "kernels", kept, dirs_exist_ok=True)
    assert seen["lanes"] == 8
    assert seen["digests"] == [digest(path, kind) for path in paths for kind in ("f32", "int8")]
