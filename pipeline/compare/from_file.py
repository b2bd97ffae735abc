"""Variants against a base of which there is only its file of 16-bit logits (logit_files.py).

    pagemill compare base.path=base.logits 'variants=[Q8_0.gguf,Q4_K_M.gguf]'

Tokens and window come from the file; the text it was made of is needed to check them only. What llama.cpp
logs as an error before it goes on is refused here: another vocabulary, another context, other tokens. The
base's likelihoods, its most likely tokens (the first of equals) and the divergences from it are those of
what was stored; of a variant everything is the engine's own, in float64.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
from omegaconf import MISSING

import engine
from pipeline import numa, provenance
from pipeline.compare import logit_files, on_the_spot
from pipeline.compare.models import Member, member, n_logits, named, open_variant
from pipeline.compare.settings import CompareSettings
from pipeline.compare.to_file import streamed
from pipeline.compare.worker import CompareSpec, CompareWorker, of_file
from pipeline.datasets import Text
from pipeline.errors import DataError, ModelError, SettingsError
from pipeline.settings import DataSettings, ModelSettings, absolute
from pipeline.tokens import TokenStream, stream_of_ids, tokens_sha256
from pipeline.worker import ShardResult, WorkerSpec, first_compiles, same

if TYPE_CHECKING:
    from pipeline.compare.plan import Checked
    from pipeline.preflight import Asked, Preflight
    from pipeline.shards import Shard

FACTORY = "pipeline.compare.from_file:FromFileWorker"


def check(settings: CompareSettings, preflight: Preflight, files: ExitStack) -> Checked:
    """As `plan.check`, with a base that is a file of logits.

    Raises:
        RefusedError: with all that a user needs to put it right.
    """
    from pipeline.compare.plan import Checked

    has_text = bool(settings.data.files) or settings.data.path.strip() not in ("", MISSING)
    if not has_text:
        path = absolute(settings.base.path)
        data = DataSettings(name=f"tokens of {Path(path).name}", path=path)
        settings = replace(settings, data=data)
    warnings = settings.validate()
    s = settings.resolved()
    paths, types = on_the_spot.told_apart(s.variants)
    _check_settings(s, types)
    base = files.enter_context(closing(logit_files.LogitFile(s.base.path)))
    limit = min(base.n_chunk, s.protocol.limit or base.n_chunk)
    if s.protocol.window != base.n_ctx:
        raise SettingsError(
            f"protocol.window={s.protocol.window}, and {base.path} has windows of {base.n_ctx} tokens",
            f"give protocol.window={base.n_ctx}",
        )
    if base.n_chunk < 2 and not has_text:
        raise DataError(
            f"{base.path}: holds 1 window; the tokens of a text are at least two windows",
            "give the text that it was made of as data.path",
        )
    base.check(limit)
    s = replace(s, protocol=replace(s.protocol, limit=limit))
    paths = [absolute(path) for path in dict.fromkeys(paths)]
    asked = _asked(s, paths[0], base, preflight, has_text)
    opened = [open_variant(path, asked.file, asked.tokenizer, files) for path in paths]
    cache = Path(s.paths.cache)
    members = [member(f, name, s.engine, cache) for f, name in zip(opened, named(paths), strict=True)]
    remarks = [_remark(base)]
    if not has_text:
        remarks.append(
            f"the tokens are those of {base.path}; give its text as data.path to have it checked that the "
            "variants' tokenizer makes the same ones"
        )
    warnings = list(dict.fromkeys([*warnings, *asked.warnings, *remarks]))
    return Checked(s, asked, _base(base, cache), members, [], warnings)


def _check_settings(s: CompareSettings, types: Sequence[str]) -> None:
    if types:
        raise SettingsError(
            f"variants: {types[0]} is a type, and {s.base.path} holds logits, no weights to make it from",
            "give the variants as files",
        )
    if s.logits.out is not None:
        raise SettingsError(
            f"logits.out={s.logits.out}: {s.base.path} is a file of logits already",
            "give a model as base.path to write one",
        )
    if s.sensitivity.is_asked:
        raise SettingsError(
            f"sensitivity: {s.base.path} holds logits, no tensors to put others in the place of",
            "give the model as base.path",
        )
    if s.protocol.name != "windows":
        raise SettingsError(
            f"protocol={s.protocol.name}: {s.base.path} holds windows, each from an empty cache",
            "use protocol=windows, or a model as base.path",
        )


def _asked(
    s: CompareSettings, variant: str, base: logit_files.LogitFile, preflight: Preflight, has_text: bool
) -> Asked:
    """What is asked of the variants; the file's tokens are known to be theirs."""

    def tokenize(text: Text, tokenizer: engine.Tokenizer, cache: Path) -> TokenStream:
        n_known = len(tokenizer.byte_lengths)
        highest = int(base.tokens.max())
        if highest >= n_known:
            raise ModelError(
                f"{base.path}: holds token {highest}, and the vocabulary of {variant} ends at {n_known - 1}",
                "compare with the base that the variants were made from",
            )
        return stream_of_ids(np.array(base.tokens, np.int32), tokenizer, cache)

    def text(data: DataSettings, cache: Path) -> Text:
        return Text("", tokens_sha256(base.tokens), base.path)

    wanted = replace(s.of_base(), model=ModelSettings(variant))
    try:
        asked = preflight.ask(wanted) if has_text else preflight.ask(wanted, text, tokenize)
    except ModelError as error:
        hint = error.hint.replace("set model.path to a GGUF file, or choose a model by model=NAME", "")
        raise ModelError(str(error), hint or "every variant is a GGUF file", kind=error.kind) from error
    n_vocab = n_logits(asked.file)
    if n_vocab != base.n_vocab:
        raise ModelError(
            f"{base.path}: has {base.n_vocab:,} logits a token, and {variant} gives {n_vocab:,}",
            "compare with the base that the variants were made from",
        )
    if has_text:
        _check_tokens(base, asked, s)
    return asked


def _check_tokens(base: logit_files.LogitFile, asked: Asked, s: CompareSettings) -> None:
    """Refuse a text that has other tokens than the file."""
    if asked.stream.is_apart:
        raise SettingsError(
            f"data: the documents are kept apart, and {base.path} holds windows of one text",
            "use data.documents=joined, or leave data out",
        )
    wanted = base.tokens[: base.n_ctx * (s.protocol.limit or base.n_chunk)]
    found = asked.stream.tokens[: wanted.size]
    differ = np.flatnonzero(found != wanted[: found.size])
    if differ.size or found.size < wanted.size:
        at = int(differ[0]) if differ.size else found.size
        told = f"{found[at]}" if differ.size else "missing: the text is shorter"
        raise DataError(
            f"{base.path}: token {at} is {wanted[at]}; of {s.data.path} under the variants' tokenizer it is "
            f"{told}",
            "give the text that the file was made of and variants of its model, or leave data out",
        )


def _base(file: logit_files.LogitFile, cache: Path) -> Member:
    try:
        sha256 = provenance.file_sha256(Path(file.path), cache)
    except OSError as error:
        raise ModelError(f"{file.path}: {error.strerror}", "the file must stay readable") from error
    subject = provenance.subject_of(sha256, "unknown", "unknown") | {"format": logit_files.FORMAT}
    model = cast("engine.GGUFFile", file)  # has what a driver asks of one
    return Member(
        named([file.path])[0], file.path, sha256, logit_files.FORMAT, file.n_bytes, None, model, subject
    )


def _remark(base: logit_files.LogitFile) -> str:
    who = " (as ik_llama.cpp does)" if base.clip_nats == logit_files.IK_CLIP_NATS else ""
    return (
        f"16-bit base: {base.path} holds {logit_files.FORMAT}; those more than {base.clip_nats} nats below "
        f"the maximum were raised{who}, the others rounded to 65,536 steps. The base's perplexity is too "
        "low, ln_ratio too high, and divergences have a floor; base.path=FILE.gguf has none of this"
    )


class Caches:
    """A cache for each variant; whatever is done to it, is done to all."""

    def __init__(self, caches: Sequence[Any]) -> None:
        self.all = list(caches)

    def clear(self) -> bool:
        """See `engine.Cache`."""
        return all([cache.clear() for cache in self.all])

    def keep(self, slot: int) -> bool:
        """See `engine.Cache`."""
        return all([cache.keep(slot) for cache in self.all])


class FileComparison:
    """In place of `engine.Comparison`: models against the records of a file.

    Attributes:
        at: the record of the next target; targets come in their order.
        models: None for the base, then the variants.
        layers_s: zeros, the time of layers is not known here.
    """

    def __init__(self, base: logit_files.LogitFile, models: Sequence[engine.Model]) -> None:
        self.at = 0
        self._base, self._models = base, models
        self.models = [None, *models]
        self.layers_s = np.zeros(len(self.models))

    def new_cache(self, n_slots: int, capacity: int, kv: str = "f32", *, fleeting: bool = False) -> Caches:
        """A cache of every model, never a fleeting one: a batch takes several calls."""
        return Caches([model.new_cache(n_slots, capacity, kv) for model in self._models])

    def compare(self, batch: engine.Batch, cache: Caches) -> npt.NDArray[np.float64]:
        """Scores every token with a target: (3 M - 1, n_scored) float64, as `engine.Comparison.compare`."""
        n_models, base = 1 + len(self._models), self._base
        targets = batch.targets[batch.targets >= 0]
        out = np.empty((3 * n_models - 1, targets.size), np.float64)
        for number, (model, own) in enumerate(zip(self._models, cache.all, strict=True), 1):
            done = 0
            for _, logits in streamed(model, batch, own):
                for row in logits:
                    stored, target = base.ln_p(self.at + done), int(targets[done])
                    out[0, done] = -stored[target]
                    out[2 * n_models - 1, done] = stored.argmax()
                    out[[number, n_models + number - 1, 2 * n_models - 1 + number], done] = _against(
                        stored, row, target
                    )
                    done += 1
        self.at += targets.size
        return out


def _against(stored: npt.NDArray[np.float64], row: npt.NDArray[np.float32], target: int) -> Any:
    """-ln p(target), divergence, most likely token; NaN for all three where a logit is not finite."""
    if not np.isfinite(row).all():
        return np.nan, np.nan, -1
    ln_sum = logit_files.ln_sum_exp(row)
    return ln_sum - float(row[target]), logit_files.divergence(stored, row, ln_sum), int(row.argmax())


class FromFileWorker(CompareWorker):
    """Scores shards of variants against a file of logits, which the spec names as the base's model.

    Raises (on construction, and by `turn_to`): as `EvalWorker`, of whichever file.
    """

    def _open(self, spec: WorkerSpec) -> None:
        assert isinstance(spec, CompareSpec), "the driver hands out one kind of spec"
        started, waited_s, compiled_s = time.perf_counter(), 0.0, 0.0
        cache = Path(spec.cache_dir)
        for gone in self._files.keys() - set(spec.models):
            self._files.pop(gone).close()
        for model in spec.models:
            if model in self._files:
                continue
            path, sha256 = model
            is_base = model == spec.models[0]
            here = self._here(of_file(spec, path), cache)
            digest = provenance.file_sha256 if is_base else provenance.model_sha256
            same(path, "SHA-256", digest(here, cache), sha256, self.host)
            opening = time.perf_counter()
            opened: Any = (
                logit_files.LogitFile(path)
                if is_base
                else engine.open(numa.own_copy(path), load=spec.engine.load)
            )
            self._files[model] = opened
            queued = time.perf_counter()
            self.model_open_s += queued - opening
            if not is_base:
                with first_compiles(cache / "locks"):
                    waited_s += time.perf_counter() - queued
                    compiled_s += float(engine.warm_up(opened, spec.engine.activations))
        self.compile_s += compiled_s
        base, *variants = (self._files[model] for model in spec.models)
        how: dict[str, Any] = {
            "threads": spec.engine.threads,
            "batch_tokens": _one_window(spec).engine.batch_tokens,
            "activations": spec.engine.activations,
        }
        self._base = cast("logit_files.LogitFile", base)
        models = [engine.load_model(file, **how) for file in variants]
        self.model = cast("engine.Model", FileComparison(self._base, models))  # what differs is `_decode`
        self.file = base
        self.open_s = max(0.0, time.perf_counter() - started - waited_s - compiled_s)

    def _read(self, spec: WorkerSpec) -> None:
        super()._read(_one_window(spec))

    def run(self, shard: Shard) -> ShardResult:
        """As `CompareWorker.run`; the base reads no tokens."""
        cast("FileComparison", self.model).at = shard.first_window * self._base.per_window
        result = super().run(shard)
        n_models = len(self.spec.models)
        return replace(result, n_tokens=result.n_tokens // n_models * (n_models - 1))

    def close(self) -> None:
        """Give all mappings back; the worker cannot score before it is turned to a run again."""
        self.__dict__.pop("_base", None)
        super().close()


def _one_window(spec: WorkerSpec) -> WorkerSpec:
    """A window a batch at most, for each model here has activations and a cache of its own."""
    fewer = min(spec.engine.batch_tokens, spec.protocol.window)
    return replace(spec, engine=replace(spec.engine, batch_tokens=fewer))
