"""Metadata of a GGUF file as one frozen record per architecture: how keys are read, and LLaMA's.

Mamba's are in engine.mamba_params; no other place knows metadata keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import UnsupportedModel

if TYPE_CHECKING:
    from engine.gguf import GGUFFile


@dataclass(frozen=True)
class Variant:
    """How an architecture differs from LLaMA."""

    rope_halves: bool = False  # rotary pairs are (i, i + half) of a head, as in GPT-NeoX, not (2i, 2i + 1)
    output_bias: bool = False  # attn_output may have a bias, as attn_q, attn_k and attn_v may in all
    head_norms: bool = False  # queries and keys of each head are normed before their rotation
    unrotated_every: int = 0  # each so many-th layer has no positions at all; 0: none
    scales: bool = False  # attention, embedding, residual and logits are scaled
    yarn_keys: bool = False  # YaRN's constants may differ from the paper's


LLAMA_VARIANTS = {
    "llama": Variant(output_bias=True),
    "mistral": Variant(output_bias=True),  # files name Mistral `llama`; the name itself means the same
    "mistral3": Variant(output_bias=True, yarn_keys=True),
    "internlm2": Variant(),
    "xverse": Variant(),
    "ernie4_5": Variant(),
    "exaone": Variant(rope_halves=True),
    "qwen2": Variant(rope_halves=True),
    "qwen3": Variant(rope_halves=True, head_norms=True),
    "smollm3": Variant(unrotated_every=4),
    "granite": Variant(output_bias=True, scales=True),
}
MAMBA_ARCHITECTURES = ("mamba", "mamba2")
ARCHITECTURES = (*LLAMA_VARIANTS, *MAMBA_ARCHITECTURES)


@dataclass(frozen=True)
class Rope:
    """Rotary positions; GGUF key (after `llama.rope.`) behind each."""

    width: int  # dimension_count: rotated features of a head
    base: float  # freq_base
    halves: bool  # see Variant.rope_halves
    factor: float  # scaling.factor: positions are this much closer; 1 where scaling.type is none
    yarn: bool  # scaling.type is yarn
    original_context: int  # scaling.original_context_length, or the model's
    attention_factor: float  # scaling.attn_factor, on cosine and sine
    beta_fast: float  # scaling.yarn_beta_fast: pairs that turn so often in the original context stay; 32
    beta_slow: float  # scaling.yarn_beta_slow: pairs that turn less are scaled; 1
    log_multiplier: float  # scaling.yarn_log_multiplier: share of YaRN's attention factor to take back; 0


@dataclass(frozen=True)
class LlamaParams:
    """Hyperparameters of a LLaMA-like model; GGUF key (after `llama.`) behind each."""

    architecture: str
    n_vocab: int  # rows of token_embd.weight
    n_ctx_train: int  # context_length
    n_layers: int  # block_count
    width: int  # embedding_length: D
    n_heads: int  # attention.head_count: H
    n_kv_heads: int  # attention.head_count_kv: G
    head_width: int  # attention.key_length, or D / H: K
    ff_width: int  # feed_forward_length: F
    rope: Rope
    norm_eps: float  # attention.layer_norm_rms_epsilon
    attention_scale: float  # attention.scale, or 1 / sqrt(K)
    variant: Variant
    embedding_scale: float  # embedding_scale, or 1
    residual_scale: float  # residual_scale, or 1: on what a half layer adds to the residual
    logit_scale: float  # logit_scale, or 1: logits are divided by it


def architecture(file: GGUFFile) -> str:
    """The file's architecture name.

    Raises:
        UnsupportedModel: it has none, or one that the engine does not run.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise UnsupportedModel(f"{file.path}: no general.architecture in the metadata; is this a model file?")
    if name not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{file.path}: architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return name


def n_vocab(file: GGUFFile) -> int:
    """Rows of the embedding, padding included.

    Raises:
        UnsupportedModel: there is no embedding.
    """
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UnsupportedModel(
            f"{file.path}: no two-dimensional tensor token_embd.weight; is this a model file?"
        )
    return embedding.shape[0]


def llama_params(file: GGUFFile) -> LlamaParams:
    """Reads and cross-checks the hyperparameters.

    Raises:
        UnsupportedModel: a key is missing, has another type, contradicts another, or switches on what is not
        computed.
    """
    name = architecture(file)
    variant = LLAMA_VARIANTS[name]
    keys = Keys(file, name)
    vocabulary = n_vocab(file)
    width, n_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_width = keys.integer("attention.key_length", max(1, width // n_heads))
    n_ctx_train = keys.integer("context_length")

    def scale(key: str, default: float) -> float:
        return keys.optional(key, default) if variant.scales else default

    params = LlamaParams(
        architecture=name,
        n_vocab=vocabulary,
        n_ctx_train=n_ctx_train,
        n_layers=keys.integer("block_count"),
        width=width,
        n_heads=n_heads,
        n_kv_heads=keys.integer("attention.head_count_kv", n_heads),
        head_width=head_width,
        ff_width=keys.integer("feed_forward_length"),
        rope=_rope(keys, variant, head_width, n_ctx_train),
        norm_eps=keys.real("attention.layer_norm_rms_epsilon"),
        attention_scale=scale("attention.scale", 1.0 / math.sqrt(head_width)),
        variant=variant,
        embedding_scale=scale("embedding_scale", 1.0),
        residual_scale=scale("residual_scale", 1.0),
        logit_scale=scale("logit_scale", 1.0),
    )
    if params.n_heads % params.n_kv_heads:
        raise UnsupportedModel(
            f"{file.path}: {params.n_heads} heads do not divide by {params.n_kv_heads} kv heads"
        )
    if params.rope.width % 2 or params.rope.width > head_width:
        raise UnsupportedModel(f"{file.path}: {params.rope.width} rotated features of a head of {head_width}")
    _refuse_switches(keys, params)
    return params


class Keys:
    """Reads the keys behind an architecture's name, and remembers which."""

    def __init__(self, file: GGUFFile, name: str) -> None:
        self.path, self.prefix = file.path, f"{name}."
        self.asked: set[str] = set()
        self.found = {
            key.removeprefix(self.prefix): value
            for key, value in file.metadata.items()
            if key.startswith(self.prefix)
        }

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive int; missing without a default, it is refused."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self.refusal(key, value, "a positive int")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive finite number; missing without a default, it is refused."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise self.refusal(key, value, "a positive float")
        return float(value)

    def optional(self, key: str, default: float) -> float:
        """The same, where 0 stands for the default too."""
        value = self._get(key, 0)
        return default if isinstance(value, (int, float)) and value == 0 else self.real(key)

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.refusal(key, value, "a string")
        return value

    def refusal(self, key: str, value: Any, expected: str) -> UnsupportedModel:
        """What to raise of a value that cannot be used."""
        return UnsupportedModel(f"{self.path}: {self.prefix}{key} is {value!r}; expected {expected}")

    def flag(self, key: str) -> bool:
        """A bool, False where it is missing."""
        value = self._get(key, False)
        if not isinstance(value, bool):
            raise self.refusal(key, value, "true or false")
        return value

    def refuse_others(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Raises UnsupportedModel for a key that nothing has read, unless its value says "off".

        neutral: what says so, where it is not 0 or "".
        """
        for key, value in self.found.items():
            if key in self.asked or key in ("vocab_size", "tensor_data_layout"):
                continue
            allowed = neutral.get(key, (0, ""))
            if not isinstance(value, (bool, int, float, str)) or value not in allowed:
                raise UnsupportedModel(
                    f"{self.path}: {self.prefix}{key} = {value!r} is not supported; expected {allowed[0]!r}"
                )

    def _get(self, key: str, default: Any) -> Any:
        self.asked.add(key)
        return self.found.get(key, default)


def _rope(keys: Keys, variant: Variant, head_width: int, n_ctx_train: int) -> Rope:
    """Rotary positions and their scaling; without a type, a factor means linear scaling, as in old files."""
    type_ = keys.text("rope.scaling.type", "linear") or "none"
    if type_ not in ("none", "linear", "yarn"):
        raise UnsupportedModel(
            f"{keys.path}: {keys.prefix}rope.scaling.type = {type_!r} is not supported; supported: none, "
            "linear, yarn, and the factors of a tensor rope_freqs.weight (Llama 3.1's scaling)"
        )
    yarn = type_ == "yarn"
    factor = keys.optional("rope.scaling.factor", keys.optional("rope.scale_linear", 1.0))
    if yarn and factor < 1.0:
        raise keys.refusal("rope.scaling.factor", factor, "at least 1 with yarn")
    beta_fast, beta_slow, log_multiplier = 32.0, 1.0, 0.0
    if variant.yarn_keys:
        beta_fast = keys.real("rope.scaling.yarn_beta_fast", beta_fast)
        beta_slow = keys.real("rope.scaling.yarn_beta_slow", beta_slow)
        log_multiplier = keys.optional("rope.scaling.yarn_log_multiplier", log_multiplier)
    return Rope(
        width=keys.integer("rope.dimension_count", head_width),
        base=keys.real("rope.freq_base", 10000.0),
        halves=variant.rope_halves,
        factor=1.0 if type_ == "none" else factor,
        yarn=yarn,
        original_context=keys.integer("rope.scaling.original_context_length", n_ctx_train),
        attention_factor=keys.optional("rope.scaling.attn_factor", 1.0),
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        log_multiplier=log_multiplier,
    )


def _refuse_switches(keys: Keys, params: LlamaParams) -> None:
    """Raises UnsupportedModel for a key that asks for what the engine would silently leave out."""
    neutral: dict[str, tuple[Any, ...]] = {
        "attention.value_length": (params.head_width,),
        "attention.causal": (True,),
        "logit_scale": (0.0, 1.0),
        "residual_scale": (0.0, 1.0),
        "embedding_scale": (0.0, 1.0),
        "rope.scaling.yarn_beta_fast": (32.0,),
        "rope.scaling.yarn_beta_slow": (1.0,),
        "rope.scaling.yarn_ext_factor": (float(params.rope.yarn), -1.0),
        "rope.scaling.yarn_attn_factor": (1.0, -1.0),
        # Granite's files turn rotation off by it; in others it is a remark.
        "rope.scaling.finetuned": (True,) if params.variant.scales else (False, True),
    }
    keys.refuse_others(neutral)
