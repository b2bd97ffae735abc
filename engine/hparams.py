"""Metadata of a GGUF file as one frozen record per architecture; the only place that knows metadata keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import UnsupportedModel

if TYPE_CHECKING:
    from engine.gguf import GGUFFile

LLAMA_NAMES = ("llama",)


@dataclass(frozen=True)
class LlamaParams:
    """Hyperparameters of a LLaMA-architecture model; GGUF key (after `llama.`) behind each."""

    architecture: str
    n_vocab: int  # rows of token_embd.weight
    n_ctx_train: int  # context_length
    n_layers: int  # block_count
    width: int  # embedding_length: D
    n_heads: int  # attention.head_count: H
    n_kv_heads: int  # attention.head_count_kv: G
    head_width: int  # attention.key_length, or D / H: K
    ff_width: int  # feed_forward_length: F
    rope_width: int  # rope.dimension_count: rotated features of a head
    rope_base: float  # rope.freq_base
    norm_eps: float  # attention.layer_norm_rms_epsilon


def architecture(file: GGUFFile) -> str:
    """The file's architecture name.

    Raises:
        UnsupportedModel: it has none, or one that the engine does not run.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise UnsupportedModel(f"{file.path}: no general.architecture in the metadata; is this a model file?")
    if name not in LLAMA_NAMES:
        raise UnsupportedModel(
            f"{file.path}: architecture {name!r} is not supported; supported: {', '.join(LLAMA_NAMES)}"
        )
    return name


def llama_params(file: GGUFFile) -> LlamaParams:
    """Reads and cross-checks the hyperparameters.

    Raises:
        UnsupportedModel: a key is missing, has another type, contradicts another, or switches on what is not
        computed.
    """
    name = architecture(file)
    meta = file.metadata

    def number(key: str, kind: type[Any], default: Any = None) -> Any:
        value = meta.get(f"{name}.{key}", default)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float) if kind is float else int)
            or value <= 0
        ):
            raise UnsupportedModel(
                f"{file.path}: {name}.{key} is {value!r}; expected a positive {kind.__name__}"
            )
        return kind(value)

    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UnsupportedModel(
            f"{file.path}: no two-dimensional tensor token_embd.weight; is this a model file?"
        )
    width, n_heads = number("embedding_length", int), number("attention.head_count", int)
    head_width = number("attention.key_length", int, max(1, width // n_heads))
    params = LlamaParams(
        architecture=name,
        n_vocab=embedding.shape[0],
        n_ctx_train=number("context_length", int),
        n_layers=number("block_count", int),
        width=width,
        n_heads=n_heads,
        n_kv_heads=number("attention.head_count_kv", int, n_heads),
        head_width=head_width,
        ff_width=number("feed_forward_length", int),
        rope_width=number("rope.dimension_count", int, head_width),
        rope_base=number("rope.freq_base", float, 10000.0),
        norm_eps=number("attention.layer_norm_rms_epsilon", float),
    )
    if params.n_heads % params.n_kv_heads:
        raise UnsupportedModel(
            f"{file.path}: {params.n_heads} heads do not divide by {params.n_kv_heads} kv heads"
        )
    if params.rope_width % 2 or params.rope_width > head_width:
        raise UnsupportedModel(f"{file.path}: {params.rope_width} rotated features of a head of {head_width}")
    _refuse_switches(file.path, name, meta, head_width)
    return params


def _refuse_switches(path: str, name: str, meta: Mapping[str, Any], head_width: int) -> None:
    """Raises UnsupportedModel for metadata that asks for what the engine would silently leave out."""
    neutral = {
        "rope.scaling.type": ("none", ""),
        "expert_count": (0,),
        "attention.value_length": (head_width,),
        "attention.sliding_window": (0,),
        "attention.causal": (True,),
        "logit_scale": (0.0, 1.0),
    }
    for key, allowed in neutral.items():
        value = meta.get(f"{name}.{key}", allowed[0])
        if value not in allowed:
            raise UnsupportedModel(
                f"{path}: {name}.{key} = {value!r} is not supported; expected {allowed[0]!r}"
            )
