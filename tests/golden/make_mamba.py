"""Makes tests/golden/mamba.npz, mamba2.npz and falcon_mamba.npz: transformers' logits and states in float64.

    python -m venv oracle && oracle/bin/pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0
    HF_HUB_OFFLINE=1 PYTHONPATH=. oracle/bin/python tests/golden/make_mamba.py

Made with those versions (torch on the CPU), NumPy 2.4.6 and Python 3.11. Weights are not stored: a case is
the arguments of `tiny_mamba` or `tiny_mamba2`, whose file holds them in float32, and a digest of them, which
shows whether a builder has changed. transformers computes much in float32 whatever the weights are (norms, A,
residuals, the scan); here `torch.float32` and `Tensor.float` mean float64 while it runs. Its Mamba-2 scans in
blocks of 8, so that several lie in a text.

Of each case c: `c.tokens` int64 (T,), `c.logits` float64 (T, V), `c.conv` and `c.ssm`, the states after the
last token in the form of `tests.reference.mamba.State`, and `c.weights`, the digest.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.make_mamba_gguf import tiny_mamba, tiny_mamba2

FOLDER = Path(__file__).parent
N_TOKENS = 24
EPS = float(np.float32(1e-5))  # as files hold it


class Case(NamedTuple):
    """A model: its file's name under golden/, its builder and arguments, transformers' `mixer_rms_eps`."""

    file: str
    build: Any
    shape: dict[str, Any]
    mixer_eps: float | None = None

    @property
    def tokens(self) -> NDArray[np.int64]:
        """int64 (T,), the last one of the vocabulary among them."""
        vocab = self.shape.get("vocab", 301)
        return np.append(np.random.default_rng(5).integers(0, vocab, N_TOKENS - 1), vocab - 1)


ODD = {"width": 36, "n_layers": 3, "conv": 3, "vocab": 263, "padding": 2, "tied": False}
CASES = {
    "plain": Case("mamba", tiny_mamba, {"seed": 1}),
    "odd": Case("mamba", tiny_mamba, ODD | {"seed": 2, "n_state": 5, "dt_rank": 7, "conv_bias": False}),
    "expand_3": Case("mamba", tiny_mamba, {"seed": 3, "width": 40, "inner": 120, "conv": 2, "dt_rank": 1}),
    "one_group": Case("mamba2", tiny_mamba2, {"seed": 4}),
    "four_groups": Case("mamba2", tiny_mamba2, {"seed": 5, "n_groups": 4, "n_state": 24, "vocab": 259}),
    "odd_heads": Case(
        "mamba2",
        tiny_mamba2,
        ODD | {"seed": 6, "n_heads": 6, "n_groups": 3, "n_state": 5, "conv_bias": False},
    ),
    "falcon": Case("falcon_mamba", tiny_mamba, {"seed": 7, "falcon": True}),
    "falcon_1e_6": Case("falcon_mamba", tiny_mamba, ODD | {"seed": 8, "falcon": True, "n_state": 7}, 1e-6),
}

NAMES = {  # of a layer: ours -> transformers'
    "attn_norm.weight": "norm.weight",
    "ssm_in.weight": "mixer.in_proj.weight",
    "ssm_conv1d.weight": "mixer.conv1d.weight",
    "ssm_conv1d.bias": "mixer.conv1d.bias",
    "ssm_x.weight": "mixer.x_proj.weight",
    "ssm_dt.weight": "mixer.dt_proj.weight",
    "ssm_dt.bias": "mixer.dt_proj.bias",
    "ssm_a": "mixer.A_log",
    "ssm_d": "mixer.D",
    "ssm_norm.weight": "mixer.norm.weight",
    "ssm_out.weight": "mixer.out_proj.weight",
}


def read(path: Path) -> dict[str, NDArray[np.float32]]:
    """An F32 file's tensors by name."""
    return {t.name: t.data for t in gguf.GGUFReader(path).tensors}


def digest(weights: Mapping[str, NDArray[np.float32]]) -> str:
    """SHA-256 of tensors with their names and shapes."""
    found = hashlib.sha256()
    for name, values in sorted(weights.items()):
        found.update(f"{name} {values.shape}".encode() + values.astype("<f4").tobytes())
    return found.hexdigest()


def checkpoint(weights: Mapping[str, NDArray[np.float32]], file: str) -> dict[str, NDArray[np.float64]]:
    """The same weights with transformers' names and shapes, float64."""
    found = {}
    for name, values in weights.items():
        values = values.astype(np.float64)
        if name.startswith("blk."):
            _, layer, short = name.split(".", 2)
            theirs = NAMES[short]
            if file == "mamba2" and short == "ssm_dt.bias":
                theirs = "mixer.dt_bias"
            if short == "ssm_a":
                values = np.log(-values)
            elif short == "ssm_conv1d.weight":
                values = values[:, None]
            if file == "mamba2" and short in ("ssm_a", "ssm_d", "ssm_norm.weight"):
                values = values.ravel()
            found[f"backbone.layers.{layer}.{theirs}"] = values
        else:
            tops = {
                "token_embd.weight": "backbone.embeddings.weight",
                "output_norm.weight": "backbone.norm_f.weight",
                "output.weight": "lm_head.weight",
            }
            found[tops[name]] = values
    return found


def run(case: Case) -> dict[str, Any]:
    """What is stored of a case."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        path = case.build(Path(folder) / "m.gguf", **case.shape)
        weights = {name: values.copy() for name, values in read(path).items()}
    shape = weights["blk.0.ssm_conv1d.weight"].shape
    width, inner = weights["blk.0.ssm_out.weight"].shape
    state = case.shape.get("n_state", 16)
    keys = {
        "vocab_size": len(weights["token_embd.weight"]),
        "hidden_size": width,
        "expand": inner // width,
        "state_size": state,
        "conv_kernel": shape[1],
        "num_hidden_layers": case.shape.get("n_layers", 2),
        "use_conv_bias": case.shape.get("conv_bias", True),
        "tie_word_embeddings": case.shape.get("tied", True),
        "layer_norm_epsilon": EPS,
    }
    if case.file == "mamba2":
        n_heads = len(weights["blk.0.ssm_dt.bias"])
        groups = case.shape.get("n_groups", 1)
        keys |= {"num_heads": n_heads, "head_dim": inner // n_heads, "n_groups": groups, "chunk_size": 8}
        config, kind = transformers.Mamba2Config(**keys), transformers.Mamba2ForCausalLM
    elif case.file == "mamba":
        keys["time_step_rank"] = weights["blk.0.ssm_dt.weight"].shape[1]
        config, kind = transformers.MambaConfig(**keys), transformers.MambaForCausalLM
    else:
        keys |= {
            "time_step_rank": weights["blk.0.ssm_dt.weight"].shape[1],
            "mixer_rms_eps": case.mixer_eps or EPS,
        }
        config, kind = transformers.FalconMambaConfig(**keys), transformers.FalconMambaForCausalLM
    model = kind(config).double().eval()
    tensors = {name: torch.from_numpy(values) for name, values in checkpoint(weights, case.file).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"} if keys["tie_word_embeddings"] else set()
    if set(missing) - tied or unexpected:
        raise RuntimeError(f"{case}: missing {missing}, unexpected {unexpected}")

    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        torch.no_grad(),
    ):
        out = model(torch.from_numpy(case.tokens)[None], use_cache=True)
    layers = out.cache_params.layers
    conv = [layer.conv_states[0][0, :, 1:].T.numpy() for layer in layers]
    ssm = [layer.recurrent_states[0][0].numpy() for layer in layers]
    found = {"logits": out.logits[0].numpy(), "conv": np.array(conv), "ssm": np.array(ssm)}
    if any(values.dtype != np.float64 for values in found.values()):
        raise RuntimeError({name: values.dtype for name, values in found.items()})
    return {"tokens": case.tokens, "weights": np.array(digest(weights)), **found}


if __name__ == "__main__":
    stored: dict[str, dict[str, Any]] = {}
    for name, case in CASES.items():
        values = run(case)
        stored.setdefault(case.file, {}).update({f"{name}.{key}": value for key, value in values.items()})
    for file, arrays in stored.items():
        target = FOLDER / f"{file}.npz"
        np.savez_compressed(target, **arrays)
        print(target.name, target.stat().st_size, "bytes", *(f"{k}{v.shape}" for k, v in arrays.items()))
