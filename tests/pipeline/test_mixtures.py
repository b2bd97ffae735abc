"""The named mixtures: the type of every tensor as libllama's quantize chooses it, on files without weights.

A file has a model's metadata and tensors, but matrices of two rows of zeros: types depend on no more.
libllama works in another process (libllama_quantize.py). cyllama 0.2.18, which is llama.cpp b9190, in the
default run; the long matrix also against the later build in llama-cpp-python 0.3.36, where that is installed.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine
from engine.ggml_types import by_name
from pipeline.errors import ModelError, SettingsError
from pipeline.quantize.mixtures import (
    ALIASES,
    MIXTURES,
    NOT_ENCODABLE,
    Assigned,
    assign,
    find_mixture,
    is_quantizable,
    libllama_order,
)
from tests.make_gguf import write_gguf
from tests.pipeline.weightless import Model, llama, mamba


def types_of(mixture: str, model: Model, **given: Any) -> list[Assigned]:
    return assign(mixture, model.metadata, model.tensors.items(), **given)


class LibLlama:
    """Files as libllama quantizes them."""

    def __init__(self, package: str, folder: Path) -> None:
        self.folder = folder
        child = [sys.executable, Path(__file__).with_name("libllama_quantize.py"), package]
        self._log = (folder / "log").open("w+")
        self._process = subprocess.Popen(
            child, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def write(self, model: Model, *, type_name="F32") -> Path:
        item = {"F32": 4, "F16": 2}
        rows = {}
        for name, shape in model.tensors.items():
            type_ = type_name if is_quantizable(name, shape) else "F32"
            rows[name] = (type_, shape, bytes(item[type_] * prod(shape)))
        return write_gguf(self.folder / "source.gguf", model.metadata, rows)

    def quantize(self, source: Path, mixture: str, imatrix=None, chosen=()) -> dict[str, str] | str:
        """Types by tensor, in the file's order; or what libllama said when it refused."""
        job = {
            "source": str(source),
            "out": str(self.folder / "out.gguf"),
            "file_type": MIXTURES[mixture].file_type,
            "imatrix": imatrix,
            "chosen": [(pattern, by_name(type_).id) for pattern, type_ in chosen],
        }
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._log.seek(0)
            pytest.fail(f"libllama died of {job}: {self._log.read()[-2000:]}")
        if said := json.loads(answer):
            return said
        with engine.open(job["out"]) as file:
            assert file.metadata["general.file_type"] == MIXTURES[mixture].file_type
            return {name: tensor.type.name for name, tensor in file.tensors.items()}

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()
        self._log.close()


def _library(package: str, folder: Path):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} (llama.cpp) is not installed")
    library = LibLlama(package, folder)
    yield library
    library.close()


@pytest.fixture(scope="module")
def libllama(tmp_path_factory):
    yield from _library("cyllama", tmp_path_factory.mktemp("libllama"))


@pytest.fixture(scope="module")
def later_libllama(tmp_path_factory):
    yield from _library("llama_cpp", tmp_path_factory.mktemp("later"))


def whole_imatrix(model: Model, names=None) -> dict[str, int]:
    """Tensor -> how many weights of importance libllama expects of it."""
    return {
        name: prod(model.tensors[name]) // model.tensors[name][-2] for name in names or model.quantizable()
    }


NO_BLOCKS = "no tensor type fallback is defined for type"


def compare(
    library: LibLlama, model: Model, mixtures=tuple(MIXTURES), *, type_name="F32", refuses=True
) -> int:
    """Compares the type of every tensor, with an importance matrix and without; how many files were refused.

    Args:
        refuses: whether the library refuses rows that do not divide by 32 in types of 32-weight blocks.
    """
    source, n_refused = library.write(model, type_name=type_name), 0
    for mixture in mixtures:
        for has_imatrix in (False, True):
            ours = assign(mixture, model.metadata, model.tensors.items(), has_imatrix)
            assert [row.name for row in ours] == list(model.tensors)
            theirs = library.quantize(source, mixture, whole_imatrix(model) if has_imatrix else None)
            what = f"{mixture}, {'an' if has_imatrix else 'no'} imatrix"
            if any(row.lacks_weights for row in ours):
                assert "requires an imatrix" in theirs or (refuses and NO_BLOCKS in theirs), what
            elif isinstance(theirs, str):
                assert refuses, f"{what}: {theirs}"
                assert NO_BLOCKS in theirs, what
                assert any(row.is_fallback and row.type == "F16" for row in ours), what
                n_refused += 1
            else:
                types = {
                    row.name: row.type
                    or (type_name if is_quantizable(row.name, model.tensors[row.name]) else "F32")
                    for row in ours
                }
                assert types == theirs, what
                assert list(theirs) == sorted(types, key=libllama_order), what
    return n_refused


LAYERED = ("Q2_K_S", "Q3_K_M", "Q4_0", "Q4_K_M", "Q4_K_S", "IQ4_XS")  # a layer's place matters
FEW = ("F16", "Q8_0", "Q4_0", "Q4_K_M", "Q2_K", "TQ1_0", "MXFP4_MOE")
CASES = {  # name -> model, mixtures
    "4 layers": (llama(4), tuple(MIXTURES)),
    "32 layers": (llama(32), LAYERED),
    "80 layers, no 70B": (llama(80), ("Q4_K_M",)),
    "80 layers, 70B": (llama(80, n_kv_heads=1), ("Q3_K_S", "Q4_K_M")),
    "4 heads a kv head, tied": (llama(n_kv_heads=2, tied=True), tuple(MIXTURES)),
    "3 heads a kv head": (llama(n_heads=6, n_kv_heads=2), ("Q2_K", "IQ4_NL")),
    "8 experts": (llama(8, n_experts=8), tuple(MIXTURES)),
    "4 experts, one for all, grouped": (llama(n_experts=4, shared=True, n_kv_heads=2), FEW),
    "one matrix of attention": (llama(qkv=True), LAYERED),
    "rows of 96, of 320, tied": (llama(width=96, ff=320, tied=True), tuple(MIXTURES)),
    "rows of 256, of 40": (llama(ff=40), tuple(MIXTURES)),
    "experts, rows of 96": (llama(ff=96, n_experts=4), ("MXFP4_MOE", "Q4_K_M")),
    "mamba": (mamba(), FEW),
    "mamba, untied, dt of 64": (mamba(rank=64, tied=False), FEW),
    "mamba2": (mamba(second=True), FEW),
}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_has_libllamas_type(libllama, case):
    n_refused = compare(libllama, *CASES[case])
    assert (n_refused > 0) == (case in ("rows of 256, of 40", "mamba")), "b9190 refuses what we store as F16"


def matrix():
    """The long one: models by name."""
    heads = {f"{8 // n_kv} heads a kv head": {"n_kv_heads": n_kv} for n_kv in (8, 2, 1)}
    ends = {"tied": {"tied": True}, "untied": {"tied": False}}
    for head, has_heads in heads.items():
        for end, has_end in ends.items():
            for n_layers in (1, 2, 4, 8, 17, 32):
                yield f"{n_layers} layers, {head}, {end}", llama(n_layers, **has_heads, **has_end)
            for n_experts in (1, 4, 8):
                shape = {"n_experts": n_experts, "shared": n_experts == 4} | has_heads | has_end
                yield f"{n_experts} experts, {head}, {end}", llama(12, **shape)
        yield f"80 layers, {head}", llama(80, **has_heads)
        yield f"80 layers, 8 experts, {head}", llama(80, n_experts=8, **has_heads)
        yield f"one matrix of attention, {head}", llama(qkv=True, **has_heads)
    for width, ff in ((64, 96), (96, 512), (256, 96), (288, 320), (40, 72), (256, 40), (40, 256)):
        for end, has_end in ends.items():
            yield f"rows of {width}, of {ff}, {end}", llama(width=width, ff=ff, **has_end)
            yield (
                f"experts, rows of {width}, of {ff}, {end}",
                llama(width=width, ff=ff, n_experts=4, **has_end),
            )
    for end, has_end in ends.items():
        for rank in (16, 48, 64, 256):
            yield f"mamba, dt of {rank}, {end}", mamba(rank=rank, **has_end)
        for n_groups in (1, 2):
            yield f"mamba2, {n_groups} groups, {end}", mamba(second=True, n_groups=n_groups, **has_end)
        yield f"mamba, rows of 96, {end}", mamba(width=96, **has_end)


MATRIX = dict(matrix())


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRIX)
def test_the_long_matrix_has_libllamas_types(libllama, name):
    compare(libllama, MATRIX[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRIX)
def test_the_long_matrix_has_a_later_libllamas_types(later_libllama, name):
    compare(later_libllama, MATRIX[name], refuses=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    "mistral3 internlm2 xverse ernie4_5 exaone qwen2 qwen3 smollm3 granite".split(),
)
def test_relatives_of_llama_have_libllamas_types(libllama, architecture):
    for n_layers, n_kv_heads, tied in ((80, 8, False), (80, 1, True), (9, 2, False)):
        model = llama(n_layers, architecture=architecture, n_kv_heads=n_kv_heads, tied=tied)
        compare(libllama, model, ("Q2_K", "Q3_K_S", "Q4_K_M", "IQ4_XS"))


ODD = {  # names, and shapes that only look like a matrix's
    "position_embd.weight": (4, 256),
    "token_types.weight": (4, 256),
    "rope_freqs.weight": (4, 256),
    "enc.blk.0.attn_v.weight": (4, 256),
    "blk.0.attn_v.bias": (4, 256),
    "blk.0.attn_q_norm.weight": (4, 256),
    "blk.0.shortconv.conv.weight": (4, 256),
    "blk.0.attn_kv_b.weight": (4, 256),
    "blk.0.ffn_down.7.weight": (4, 64),
    "blk.0.row.weight": (1, 256),
    "blk.0.rows.weight": (1, 4, 256),
    "blk.0.stack_of_rows.weight": (4, 1, 256),
    "blk.0.column.weight": (256, 1),
    "blk.1.one_value.weight": (1, 1, 1),
    "blk.1.attn_v.weight.scale": (4, 256),
    "cls.output.weight": (4, 256),
}


def test_odd_names_and_shapes_have_libllamas_types(libllama):
    compare(libllama, llama(4, extra=ODD, tied=True), ("Q8_0", "Q4_K_M", "Q3_K_M"))


def test_types_do_not_depend_on_the_order_of_tensors_or_what_type_they_have(libllama):
    model = llama(12)
    backwards = Model(model.metadata, dict(reversed(model.tensors.items())))
    compare(libllama, backwards, ("Q4_K_M", "F16"), type_name="F16")
    for mixture in MIXTURES:
        ahead = {row.name: row for row in assign(mixture, model.metadata, model.tensors.items())}
        assert {row.name: row for row in assign(mixture, model.metadata, backwards.tensors.items())} == ahead


@pytest.mark.parametrize("mixture", ["Q4_K_M", "Q3_K_M", "Q4_K_S"])
def test_chosen_types_have_their_way_and_are_not_counted(libllama, mixture):
    model = llama(9)
    rules = [
        ("blk.1.", "IQ4_XS"),
        ("attn_v", "Q8_0"),
        ("blk.[03].ffn_down", "Q5_1"),
        ("^token_embd|norm", "Q6_K"),
    ]
    for given in (rules[:1], rules[1:], rules[::2], rules[2:3]):
        chosen: dict[str, str] = {}
        for pattern, type_ in given:
            for name in model.tensors:
                if re.search(pattern, name):
                    chosen.setdefault(name, type_)
        ours = assign(mixture, model.metadata, model.tensors.items(), chosen=chosen)
        theirs = libllama.quantize(libllama.write(model), mixture, chosen=given)
        assert {row.name: row.type or "F32" for row in ours} == theirs


def test_chosen_types_count_beside_floats_too():
    rows = types_of("F16", llama(1), chosen={"blk.0.attn_v.weight": "Q6_K", "blk.0.attn_norm.weight": "Q6_K"})
    types = {row.name: row.type for row in rows}
    assert types["blk.0.attn_v.weight"] == "Q6_K"
    assert types["blk.0.attn_q.weight"] == "F16"
    assert types["blk.0.attn_norm.weight"] is None


@pytest.mark.parametrize(
    "known",
    [[], ["ffn_down"], ["attn", "ffn"], ["attn", "ffn", "token_embd", "output"]],
    ids=["nothing", "ffn_down", "layers", "all"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_an_imatrix_that_lacks_what_a_mixture_needs_is_told(libllama, known, tied):
    model = llama(tied=tied)
    names = [name for name in model.quantizable() if any(part in name for part in known)]
    ours = assign("Q2_K_S", model.metadata, model.tensors.items(), lambda name: name in names)
    theirs = libllama.quantize(libllama.write(model), "Q2_K_S", whole_imatrix(model, names) if names else {})
    lacking = sorted((row.name for row in ours if row.lacks_weights), key=libllama_order)
    if isinstance(theirs, str):
        assert f"Missing importance matrix for tensor {lacking[0]} " in theirs
    else:
        assert not lacking
        assert {row.name: row.type or "F32" for row in ours} == theirs


def test_no_imatrix_is_asked_for_where_nothing_becomes_q2_k(libllama):
    model = llama(2, width=96, ff=96)
    assert not any(row.lacks_weights for row in types_of("Q2_K_S", model))
    assert isinstance(libllama.quantize(libllama.write(model), "Q2_K_S"), dict)


def test_every_type_can_be_encoded():
    models = [llama(8, ff=ff, n_experts=n, n_kv_heads=1) for ff in (512, 96, 40) for n in (0, 8)]
    for mixture in MIXTURES:
        for model in (*models, mamba()):
            for has_imatrix in (False, True):
                rows = assign(mixture, model.metadata, model.tensors.items(), has_imatrix)
                assert {row.type for row in rows if row.type} <= engine.ENCODABLE
                for row in rows:
                    columns = model.tensors[row.name][-1]
                    assert row.type is None or columns % by_name(row.type).block_size == 0


def test_a_fallback_says_what_was_wanted():
    rows = {row.name: row for row in types_of("Q4_K_M", mamba(1))}
    assert rows["blk.0.ssm_dt.weight"] == Assigned("blk.0.ssm_dt.weight", "F16", "Q4_K")
    assert rows["blk.0.ssm_dt.weight"].is_fallback
    assert rows["blk.0.ssm_x.weight"] == Assigned("blk.0.ssm_x.weight", "Q4_K", "Q4_K")
    assert rows["blk.0.ssm_conv1d.weight"] == Assigned("blk.0.ssm_conv1d.weight", None, None)
    assert [row.name for row in rows.values() if row.is_fallback] == ["blk.0.ssm_dt.weight"]


def test_names_and_numbers_are_llama_quantizes(libllama):
    source = libllama.write(llama(1))
    for mixture in MIXTURES.values():
        assert find_mixture(mixture.name.lower()) is mixture
        imatrix = whole_imatrix(llama(1)) if mixture.needs_imatrix else None
        theirs = libllama.quantize(source, mixture.name, imatrix)  # and the file_type in it is the one given
        assert mixture.type in theirs.values() or mixture.name == "MXFP4_MOE"  # which is for experts
    assert {alias: find_mixture(alias).name for alias in ALIASES} == ALIASES


@pytest.mark.parametrize("name", NOT_ENCODABLE)
def test_mixtures_that_cannot_be_encoded_name_the_nearest_that_can(name):
    with pytest.raises(SettingsError, match=f"quantize.type={name.lower()}: .* can be read but not") as e:
        find_mixture(name.lower())
    assert f"nearest mixture that can be written is {NOT_ENCODABLE[name]}" in e.value.hint
    assert NOT_ENCODABLE[name] in MIXTURES


def test_an_unknown_mixture_is_refused_with_all_names():
    with pytest.raises(SettingsError, match=r"quantize\.type=Q7_K: no such mixture") as e:
        types_of("Q7_K", llama(1))
    assert all(name in e.value.hint for name in MIXTURES)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("block_count", None, "llama.block_count is missing"),
        ("block_count", "nine", "llama.block_count is 'nine'"),
        ("attention.head_count", [], r"llama.attention.head_count is \[\]"),
        ("expert_count", 1.5, "llama.expert_count is 1.5"),
    ],
)
def test_metadata_that_types_depend_on_is_asked_for(key, value, said):
    model = llama(2)
    metadata = {k: v for k, v in (model.metadata | {f"llama.{key}": value}).items() if v is not None}
    with pytest.raises(ModelError, match=f"{said}, expected a whole number"):
        assign("Q4_K_M", metadata, model.tensors.items())


def test_heads_of_the_first_layer_count_where_layers_differ(libllama):
    for n_kv_heads in ([2, 8], [8, 2]):
        model = llama(2)
        model.metadata["llama.attention.head_count_kv"] = np.array(n_kv_heads, np.int32)
        compare(libllama, model, ("Q2_K",))


def test_an_expert_without_a_layer_is_refused_as_by_libllama(libllama):
    model = llama(2, n_experts=4, extra={"blk.2.ffn_down_exps.weight": (4, 2, 512)})
    with pytest.raises(ModelError, match=r"'blk.2.ffn_down_exps.weight': expected 'blk.N.' in front, N less"):
        types_of("Q4_K_M", model)
    assert "blk.2.ffn_down_exps.weight" in libllama.quantize(libllama.write(model), "Q4_K_M")
