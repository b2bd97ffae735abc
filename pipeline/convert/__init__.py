"""A Hugging Face checkpoint in, a GGUF file out.

    checkpoint.py  config.py      a folder: config.json, tensors by name
    safetensors.py torch_files.py tensors.py       where they lie, and how rows become float32
    plan.py  mamba.py llama.py    which tensor goes where, and metadata, by architecture
    vocabulary.py  pretokenizer.py sentencepiece.py    the tokenizer
    encode.py  writer.py          types; the file, streamed

Everything is checked before a weight is read, but what only the weights show: that they are finite, and that
an output layer is the embedding. Nothing is left behind if anything is wrong.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.convert.checkpoint import Checkpoint, open_checkpoint
from pipeline.convert.llama import plan_llama
from pipeline.convert.mamba import plan_mamba, plan_mamba2
from pipeline.convert.plan import Plan
from pipeline.convert.vocabulary import read_vocabulary
from pipeline.convert.writer import check_place, write
from pipeline.settings import ConvertSettings, nearest

__all__ = ["ARCHITECTURES", "convert"]

_log = logging.getLogger(__name__)

ARCHITECTURES: dict[str, Callable[[Checkpoint, str], Plan]] = {
    "MambaForCausalLM": plan_mamba,
    "MambaLMHeadModel": plan_mamba,
    "FalconMambaForCausalLM": plan_mamba,
    "Mamba2ForCausalLM": plan_mamba2,
    "LlamaForCausalLM": plan_llama,
    "MistralForCausalLM": plan_llama,
    "Qwen2ForCausalLM": plan_llama,
    "Qwen3ForCausalLM": plan_llama,
}
"""By the first of config.json's `architectures`."""

_BY_MODEL_TYPE = {
    "mamba": "MambaForCausalLM",
    "falcon_mamba": "FalconMambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def convert(settings: ConvertSettings) -> dict[str, Any]:
    """Converts a checkpoint and returns the job's keys (contract.md 5).

    With `dry_run` everything is checked but the weights' values, and nothing is written.

    Raises:
        RefusedError: the checkpoint, the settings or the place of the output cannot be used; nothing is left.
        StorageFailure: the file could not be written; nothing is left of it.
    """
    began = time.monotonic()
    settings.validate()
    s = settings.resolved()
    folder, out, wanted = Path(s.source.dir), Path(s.convert.out), s.convert.type
    checkpoint = open_checkpoint(folder)
    plan = _plan(checkpoint)
    named = None if s.convert.tokenizer is None else Path(s.convert.tokenizer)
    vocabulary = read_vocabulary(folder, named, checkpoint.config).padded(plan.n_rows, plan.n_vocab)
    check_place(out, plan, wanted, overwrite=s.convert.overwrite)
    warnings = plan.warnings + vocabulary.warnings
    for warning in warnings:
        _log.warning("%s", warning)
    summary = {
        "out": str(out),
        "sha256": None,
        "bytes": None,
        "architecture": plan.architecture,
        "type": wanted,
        "n_tensors": len(plan.targets),
        "n_vocab": vocabulary.n_tokens,
        "n_vocab_padded": plan.n_vocab,
        "tied": plan.tied,
        "pre_tokenizer": vocabulary.pre,
        "source_bytes": checkpoint.n_bytes,
        "peak_anonymous_bytes": None,
        "warnings": warnings,
    }
    if not s.dry_run:
        _log.info("converting %s to %s, %s", folder, out, wanted)
        written = write(plan, vocabulary.keys(), folder.name, wanted, out)
        summary |= {
            "sha256": written.sha256,
            "bytes": written.n_bytes,
            "peak_anonymous_bytes": written.peak_anonymous_bytes,
        }
        _log.info("%s: %s bytes, sha256 %s", out, f"{written.n_bytes:,}", written.sha256)
    return summary | {"wall_s": time.monotonic() - began}


def _plan(checkpoint: Checkpoint) -> Plan:
    """The plan of a checkpoint of any known architecture.

    Raises:
        ModelError: config.json names another, or none.
    """
    config = checkpoint.config
    said = config.get("architectures", default=[])
    name = (
        str(said[0]) if isinstance(said, list) and said else _BY_MODEL_TYPE.get(config.get("model_type"), "")
    )
    if not name and "d_model" in config.values:  # the original Mamba's config names no architecture
        layer = config.get("layer", default="Mamba1")
        name = {"Mamba1": "MambaForCausalLM", "Mamba2": "Mamba2ForCausalLM"}.get(layer, str(layer))
    if name == "MambaLMHeadModel" and config.get("layer") == "Mamba2":
        name = "Mamba2ForCausalLM"
    if name not in ARCHITECTURES:
        raise config.refusal(
            f"the architecture {name!r} cannot be converted{nearest(name, list(ARCHITECTURES))}",
            "convert a checkpoint of one of these architectures",
        )
    return ARCHITECTURES[name](checkpoint, name)
