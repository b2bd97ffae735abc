"""Digests of everything on the way from tokens to scores, and of a file's tensors: where bits part.

Two runs whose scores differ part at one output first. What a layer leaves at hand is digested, named by the
weight or the step that made it, in the order in which it is computed; a name stands for all that happened
since the one before:

    LLaMA and relatives   attn_v (attn_norm, attn_v), attn_k (with its norm and rope), attn_q (the same, and
                          attention), attn_output (added to the residual), ffn_up (ffn_norm, ffn_gate,
                          ffn_up), ffn_down
    Mamba, FalconMamba    ssm_in (attn_norm, ssm_in), ssm_x (convolution, ssm_x, norms), ssm_dt, ssm_scan
                          (ssm_a, ssm_d, the gate), ssm_out
    Mamba-2               ssm_in (attn_norm, ssm_in but for the gate), ssm_conv1d, ssm_norm (scan, the gate,
                          its norm), ssm_out

The convolution overwrites its inputs: of those, the last of each sequence count, which its state keeps.
Values are taken token by token, sequences and positions rising: no number of threads, width of registers or
order within the batch changes a digest.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.recurrent import RecurrentCache

if TYPE_CHECKING:
    from engine.batch import Batch
    from engine.gguf import GGUFFile
    from engine.models.decoder import Decoder

_CONV_INPUTS = "ssm_in"
"""Made what the state of a convolution keeps."""


def trace(model: Any, batch: Batch, *, kv: str = "f32") -> dict[str, str]:
    """Decodes a batch from an empty cache; SHA-256 of each output's bits, in the order of the network.

    Args:
        model: as `load_model` returned it.
        batch: of up to `batch_tokens` tokens; a recurrent model's sequences begin at position 0.
        kv: as for `Model.new_cache`.

    Returns:
        "token_embd"; "blk.0.attn_v" and so on, see above; "output_norm", float32 (tokens, D); "output", the
        float32 logits of the tokens marked in `batch.outputs`, if any; "nll", the float64 -ln p of the
        targets, if any. All little-endian.

    Raises:
        CapacityError, ValueError: as `Model.nll`.
    """
    decoder: Decoder = model
    digests: dict[str, hashlib._Hash] = {}

    def look(name: str, values: NDArray[Any]) -> None:
        digest = digests.setdefault(name, hashlib.sha256())
        digest.update(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).data)

    slots = np.unique(batch.slots).tolist()
    cache = decoder.new_cache(slots[-1] + 1, int(batch.positions.max()) + 1, kv)
    decoder.targets(batch)
    decoder.watch(batch, cache, look)
    if isinstance(cache, RecurrentCache):
        kept = cache.states[0][[cache.cell(slot) for slot in slots]]
        for layer in range(kept.shape[1]):
            look(f"blk.{layer}.{_CONV_INPUTS}", kept[:, layer])
    if batch.outputs.any():
        look("output", decoder.head_logits(batch))
    if batch.scored.size:
        look("nll", decoder.head_nll(batch))
    return {name: digest.hexdigest() for name, digest in digests.items()}


def tensor_digests(file: GGUFFile, threads: int | None = None) -> dict[str, str]:
    """SHA-256 of every tensor's bytes by name, in the file's order; of a split model, of all its files.

    Args:
        threads: that hash side by side, by default one a CPU, at most 8.
    """

    def digest(data: NDArray[np.uint8]) -> str:
        return hashlib.sha256(data.data).hexdigest()

    tensors = file.tensors
    with ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 8)) as pool:
        return dict(zip(tensors, pool.map(digest, [each.data for each in tensors.values()]), strict=True))
