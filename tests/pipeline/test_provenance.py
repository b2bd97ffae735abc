"""Keys: all that can change a value is in them, nothing else; digests are computed once."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from pipeline import provenance
from pipeline.provenance import canonical_json, file_sha256, key_of, run_key, subject_of

MEASURE = {
    "data_sha256": "a",
    "tokens_sha256": "b",
    "protocol": "windows",
    "protocol_version": 1,
    "protocol_window": 512,
}
SUBJECT = {"model_sha256": "c", "adapters": "", "kv_type": "f32", "activation_type": "f32", "numerics": 1}


def test_key_is_the_digest_of_canonical_json():
    assert canonical_json({"b": [1, None], "a": "é"}) == '{"a":"\\u00e9","b":[1,null]}'
    text = canonical_json([MEASURE, SUBJECT])
    assert json.loads(text) == [MEASURE, SUBJECT]
    assert run_key(MEASURE, SUBJECT) == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert run_key(dict(reversed(MEASURE.items())), SUBJECT) == run_key(MEASURE, SUBJECT)
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_every_field_moves_the_run_key():
    keys = {run_key(MEASURE, SUBJECT)}
    for fields, place in ((MEASURE, 0), (SUBJECT, 1)):
        for name in fields:
            pair = [MEASURE, SUBJECT]
            pair[place] = fields | {name: "other"}
            keys.add(run_key(*pair))
    assert len(keys) == 1 + len(MEASURE) + len(SUBJECT)
    assert all(len(key) == 16 for key in keys)


def test_subject_follows_numerics(monkeypatch):
    import engine

    before = key_of(subject_of("c", "f32", "f32"))
    monkeypatch.setattr(engine, "NUMERICS", engine.NUMERICS + 1)
    assert key_of(subject_of("c", "f32", "f32")) != before


def test_subject_follows_what_changes_bits():
    kinds = [(kv, activations) for kv in ("f32", "f16") for activations in ("f32", "int8")]
    keys = {key_of(subject_of("c", *kind)) for kind in kinds}
    assert len(keys) == 4


def test_digest_is_computed_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    path, cache = tmp_path / "m.gguf", tmp_path / "cache"
    path.write_bytes(b"one")
    digest = file_sha256(path, cache)
    assert digest == hashlib.sha256(b"one").hexdigest()
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert file_sha256(path, cache) == digest
    monkeypatch.undo()
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert file_sha256(path, cache) == hashlib.sha256(b"two").hexdigest()


def test_a_cache_that_is_broken_or_unwritable_only_costs_time(tmp_path):
    path, cache = tmp_path / "m.gguf", tmp_path / "cache"
    path.write_bytes(b"one")
    digest = file_sha256(path, cache)
    for kept in (cache / "digests").iterdir():
        kept.write_text("{")
    assert file_sha256(path, cache) == digest
    assert file_sha256(path, path / "no folder") == digest


def test_provenance_names_versions_and_processor():
    found = provenance.versions()
    assert {"pagemill", "python", "numpy", "pyarrow"} <= found.keys()
    assert provenance.cpu_model()
    sha = provenance.git_sha()
    inside = (Path(provenance.__file__).parents[1] / ".git").exists()
    assert sha is None if not inside else sha is None or len(sha.removesuffix("+dirty")) == 40
