"""The named mixtures of llama-quantize: which tensor of a model gets which type.

    assign("Q4_K_M", file.metadata, [(t.name, t.shape) for t in file.tensors.values()])

A mixture has one type for most tensors and better ones where errors cost most: the output layer, values
(attn_v), what a feed-forward layer puts back (ffn_down), the first and the last layers.

The types are those of llama.cpp's `llama_model_quantize`: tests/pipeline/test_mixtures.py compares every
tensor with build b9190 (cyllama 0.2.18) and a later one (llama-cpp-python 0.3.36), on the architectures that
the engine runs and on experts. Others may have exceptions that are not here, as Falcon has. Builds differ in:

- Rows that do not divide by 32, in types of 32-weight blocks (Mamba's ssm_dt often has 16 or 48 columns):
  b9190 refuses the file; the later one stores F16, as both do where the k-quants do not fit, and as we do.
- attn_qkv: these two treat it as attn_v; builds before 2026 had a rule for it.

Source: https://github.com/ggml-org/llama.cpp, src/llama-quant.cpp and tools/quantize/README.md.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.errors import ModelError, SettingsError
from pipeline.quantize.mixture_rules import (
    ModelFacts,
    TensorFacts,
    layer_of,
    part_of,
    type_that_fits,
    wanted_type,
)


class Mixture(NamedTuple):
    """A file type: its name, the metadata's general.file_type, the type of tensors that no rule names."""

    name: str
    file_type: int
    type: str
    needs_imatrix: bool = False  # refused without an importance matrix of every tensor it makes Q2_K


MIXTURES = {
    mixture.name: mixture
    for mixture in (
        Mixture("F32", 0, "F32"),
        Mixture("F16", 1, "F16"),
        Mixture("BF16", 32, "BF16"),
        Mixture("Q8_0", 7, "Q8_0"),
        Mixture("Q6_K", 18, "Q6_K"),
        Mixture("Q5_K_M", 17, "Q5_K"),
        Mixture("Q5_K_S", 16, "Q5_K"),
        Mixture("Q5_1", 9, "Q5_1"),
        Mixture("Q5_0", 8, "Q5_0"),
        Mixture("Q4_1", 3, "Q4_1"),
        Mixture("Q4_K_M", 15, "Q4_K"),
        Mixture("Q4_K_S", 14, "Q4_K"),
        Mixture("IQ4_NL", 25, "IQ4_NL"),
        Mixture("Q4_0", 2, "Q4_0"),
        Mixture("IQ4_XS", 30, "IQ4_XS"),
        Mixture("MXFP4_MOE", 38, "MXFP4"),
        Mixture("Q3_K_L", 13, "Q3_K"),
        Mixture("Q3_K_M", 12, "Q3_K"),
        Mixture("Q3_K_S", 11, "Q3_K"),
        Mixture("Q2_K", 10, "Q2_K"),
        Mixture("Q2_K_S", 21, "Q2_K", needs_imatrix=True),
        Mixture("TQ2_0", 37, "TQ2_0"),
        Mixture("TQ1_0", 36, "TQ1_0"),
    )
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
NOT_ENCODABLE = {  # llama-quantize's mixtures of types that cannot be encoded here -> the nearest that can
    "IQ3_M": "Q3_K_M",
    "IQ3_S": "Q3_K_S",
    "IQ3_XS": "Q3_K_S",
    "IQ3_XXS": "Q2_K",
    "IQ2_M": "Q2_K_S",
    "IQ2_S": "Q2_K_S",
    "IQ2_XS": "Q2_K_S",
    "IQ2_XXS": "Q2_K_S",
    "IQ1_M": "Q2_K_S",
    "IQ1_S": "Q2_K_S",
    "Q1_0": "Q2_K_S",
}


class Assigned(NamedTuple):
    """What becomes of a tensor."""

    name: str
    type: str | None  # None: it stays as it is, whatever its type
    wanted_type: str | None  # what the mixture or the user wants; another than `type` if rows do not divide
    lacks_weights: bool = False  # libllama refuses this type in this mixture without an importance matrix

    @property
    def is_fallback(self) -> bool:
        """Whether the rows are no whole blocks of the type that was wanted."""
        return self.type != self.wanted_type


def find_mixture(name: str) -> Mixture:
    """The mixture that llama-quantize calls so, in any case; SettingsError for others, with a way on."""
    key = name.upper()
    if found := MIXTURES.get(ALIASES.get(key, key)):
        return found
    if nearest := NOT_ENCODABLE.get(key):
        raise SettingsError(
            f"quantize.type={name}: its tensor types can be read but not written here",
            f"the nearest mixture that can be written is {nearest}",
        )
    raise SettingsError(f"quantize.type={name}: no such mixture", f"one of {', '.join(MIXTURES)}")


_KEPT = re.compile(
    r"_norm\.weight"  # of which some are matrices, as Mamba-2's ssm_norm
    r"|ffn_gate_inp\.weight"  # what chooses experts
    r"|ssm_conv1d|shortconv\.conv\.weight"  # convolutions: a few columns
    r"|^position_embd\.weight$|^token_types\.weight$"
)


def is_quantizable(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor's type may change: a matrix of weights, or a stack of them; `shape` as NumPy's."""
    n_ones = next((i for i, size in enumerate(shape) if size != 1), len(shape))  # in front: no dimensions
    return len(shape) - n_ones >= 2 and name.endswith("weight") and not _KEPT.search(name)


def libllama_order(name: str) -> tuple[int, str]:
    """Sort key of the order in which libllama quantizes and writes tensors: by layer, then by name."""
    return layer_of(name), name


def assign(
    mixture: Mixture | str,
    metadata: Mapping[str, Any],
    tensors: Iterable[tuple[str, Sequence[int]]],
    has_imatrix: bool | Callable[[str], bool] = False,
    chosen: Mapping[str, str] | None = None,
) -> list[Assigned]:
    """Gives each tensor its type.

    Args:
        mixture: one of MIXTURES, or a name for `find_mixture`.
        metadata: the file's: architecture, block_count, attention.head_count, .head_count_kv, expert_count.
        tensors: name and shape, NumPy's order: columns last, experts first. All of the model's: the rules
            count them, and ask whether there is an output layer.
        has_imatrix: whether there is an importance matrix; or, of one that lacks tensors, which it has.
        chosen: types that the user chose, by name. These tensors are not counted, as in libllama, so that
            "the first two attn_v" are the first two others. Unlike there they count beside F32, F16 and BF16
            too. For tensors that are never quantized they mean nothing.

    Returns:
        One a tensor, in the order given.

    Raises:
        SettingsError: no such mixture.
        ModelError: a key of the metadata is missing or no number; a name lacks the layer that a rule needs.
    """
    mixture = find_mixture(mixture) if isinstance(mixture, str) else mixture
    chosen = chosen or {}
    shapes = {name: tuple(shape) for name, shape in tensors}
    model = _describe(metadata, shapes, bool(has_imatrix))
    counts: dict[str, int] = {}
    assigned = {}
    for name in sorted(shapes, key=libllama_order):
        shape = shapes[name]
        if not is_quantizable(name, shape):
            continue
        if name in chosen:
            wanted = chosen[name]
        else:
            part = part_of(name)
            tensor = TensorFacts(name, shape, part, n_before=counts.get(part, 0))
            counts[part] = tensor.n_before + 1
            wanted = wanted_type(mixture.name, mixture.type, tensor, model)
        type_ = type_that_fits(wanted, shape[-1])
        lacks_weights = (
            mixture.needs_imatrix
            and type_ == "Q2_K"
            and name != "token_embd.weight"
            and not (has_imatrix(name) if callable(has_imatrix) else has_imatrix)
        )
        assigned[name] = Assigned(name, type_, wanted, lacks_weights)
    return [assigned.get(name, Assigned(name, None, None)) for name in shapes]


def _describe(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], has_imatrix: bool
) -> ModelFacts:
    architecture = metadata.get("general.architecture")

    def count(key: str, default: int | None = None) -> int:
        key = f"{architecture}.{key}"
        value = metadata.get(key, default)
        if not isinstance(value, str) and hasattr(value, "__len__") and len(value):
            value = value[0]  # a number a layer: llama.cpp asks for the first one's
        try:
            return operator.index(value)
        except TypeError:
            raise ModelError(
                f"metadata: {key} is {'missing' if value is None else repr(value)}, expected a whole number, "
                "on which the types of a mixture depend",
                "is this a whole model file?",
            ) from None

    n_layers, n_heads = count("block_count"), count("attention.head_count", 0)
    n_kv_heads = count("attention.head_count_kv", n_heads)
    is_grouped_llama = architecture in ("llama", "mistral") and n_heads != n_kv_heads
    return ModelFacts(
        n_layers=n_layers,
        n_grouped=n_heads // n_kv_heads if n_kv_heads else 0,
        n_experts=count("expert_count", 0),
        is_70b=n_layers == 80 and (is_grouped_llama or architecture == "qwen2"),
        is_tied="output.weight" not in shapes,
        n_values=sum(part_of(name) == "attn_v" for name in shapes),
        has_imatrix=has_imatrix,
    )
