"""What a comparison will compute: a base and its variants in pairs, and of each pair what is left.

A pair is one base and one variant under one measure; it has a key, a folder and a plan of its own, so it is
found again by any later comparison that has it among others, and adding a variant computes that one alone. A
task is a shard with all pairs that lack it, which one worker takes through all their models at once.

    pair_key   key of measure, base and variant; another one where targets are not kept
    run_key    key of the pairs' keys in rising order
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline import capacity, handover, provenance, store
from pipeline.compare import on_the_spot
from pipeline.compare.logit_files import is_logit_file
from pipeline.compare.models import Member, distinct, member, named, open_variant
from pipeline.compare.sequence import visiting_order
from pipeline.compare.settings import CompareSettings
from pipeline.compare.worker import CompareSpec, PairSpec, identity, states_folder
from pipeline.errors import ModelError, StoreError
from pipeline.executor import Task
from pipeline.folders import folder_of
from pipeline.preflight import Asked, NotFetched, Preflight, wanted_model
from pipeline.settings import absolute
from pipeline.shards import Shard, n_abreast, plan
from pipeline.windows import CacheShape, cache_shape

if TYPE_CHECKING:
    import engine


_DRAWN_TOGETHER = 4  # windows: shards of so many are whole


@dataclass(frozen=True)
class Pair:
    """A base and one variant, and what is there of it.

    Attributes:
        plan: what its `plan.json` says, or will.
    """

    key: str
    variant: Member
    folder: Path
    plan: dict[str, Any]
    shards: list[Shard]
    finished: store.Finished

    @property
    def windows_per_shard(self) -> int:
        """Fixed when the pair was begun."""
        return int(self.plan["windows_per_shard"])

    @property
    def todo(self) -> list[Shard]:
        """Shards that are not finished, in window order."""
        return [shard for shard in self.shards if shard not in self.finished.paths]


@dataclass(frozen=True)
class Checked:
    """A comparison that nothing speaks against; variants that are types may still have to be made.

    Attributes:
        missing: type and path of each file that is not there yet.
    """

    settings: CompareSettings
    asked: Asked
    base: Member
    files: list[Member]
    missing: list[tuple[str, Path]]
    warnings: list[str]


@dataclass(frozen=True)
class Planned:
    """A comparison whose models are all there; `pairs` are the largest variant first."""

    settings: CompareSettings
    asked: Asked
    base: Member
    pairs: list[Pair]
    run_key: str
    folder: Path
    warnings: list[str]

    @property
    def measure(self) -> dict[str, Any]:
        """What was asked."""
        return self.asked.measure

    @property
    def states(self) -> Path:
        """Where the states lie that documents' shards hand on, seen from here."""
        return handover.place(_spec(self, self.pairs))

    @property
    def n_windows(self) -> int:
        """All that there are, should nothing stop it."""
        return self.asked.n_windows

    @property
    def order(self) -> npt.NDArray[np.int64]:
        """(n_windows,) windows in the order in which they are taken.

        That of the text, but where a decision may end the work groups of neighbours are drawn by `seed`, so
        that it is about the whole text. Windows that carry a state cannot be drawn.
        """
        carries = self.asked.protocol.begins(self.asked.stream.tokens.size) is not None
        windows = np.arange(self.n_windows)
        if self.settings.stop.name != "decided" or carries:
            return windows
        groups = np.split(windows, range(_DRAWN_TOGETHER, self.n_windows, _DRAWN_TOGETHER))
        return np.concatenate([groups[i] for i in visiting_order(len(groups), self.settings.seed)])


def check(settings: CompareSettings, preflight: Preflight, files: ExitStack) -> Checked:
    """Check settings, data, the base and every variant; files that types stand for are checked, not made.

    Args:
        files: closes the variants.

    Raises:
        RefusedError: with all that a user needs to put it right.
    """
    if is_logit_file(settings.base.path):
        from pipeline.compare import from_file

        return from_file.check(settings, preflight, files)
    warnings = settings.validate()
    s = settings.resolved()
    paths, types = on_the_spot.told_apart(s.variants)
    try:
        asked = preflight.ask(s.of_base())
    except NotFetched:
        raise
    except ModelError as error:
        raise ModelError(
            str(error), error.hint.replace("model.path", "base.path"), kind=error.kind
        ) from error
    cache = Path(s.paths.cache)
    base = member(asked.file, named([s.base.path])[0], s.engine, cache)
    paths = [absolute(path) for path in dict.fromkeys(paths)]
    opened = [open_variant(path, base.file, asked.tokenizer, files) for path in paths]
    members = [member(f, name, s.engine, cache) for f, name in zip(opened, named(paths), strict=True)]
    missing = []
    for name in dict.fromkeys(types):
        path = on_the_spot.path_of(name, s, base.sha256)
        on_the_spot.check(name, s, path)
        if path.exists():
            members.append(_made(name, path, s, asked, files))
        else:
            missing.append((name, path))
    if s.logits.out is not None:
        from pipeline.compare import to_file

        warnings += to_file.check(s, asked, [s.base.path, *paths])
    warnings = list(dict.fromkeys(warnings + asked.warnings))
    return Checked(s, asked, base, members, missing, warnings)


def make_missing(checked: Checked, files: ExitStack) -> Checked:
    """Quantize the base to the types that are not in the cache yet.

    Raises:
        PipelineError: as `pipeline.quantize.quantize`.
    """
    made = []
    for name, path in checked.missing:
        on_the_spot.make(name, checked.settings, path)
        made.append(_made(name, path, checked.settings, checked.asked, files))
    return replace(checked, files=[*checked.files, *made], missing=[])


def planned(checked: Checked) -> Planned:
    """The pairs, what is finished of each, and whether the workers will fit into memory.

    Raises:
        RefusedError: a folder holds another measure's plan; the machine's memory is too small.
    """
    s, asked, base = checked.settings, checked.asked, checked.base
    variants, remarks = distinct(base, checked.files)
    pairs = [_pair(s, asked, base, variant) for variant in variants]
    warnings = [*checked.warnings, *remarks]
    for pair in pairs:
        warnings += pair.finished.remarks
        if pair.windows_per_shard != s.cluster.windows_per_shard:
            warnings.append(
                f"cluster.windows_per_shard={s.cluster.windows_per_shard} is ignored for "
                f"{pair.variant.name}: it was begun with {pair.windows_per_shard}"
            )
    run_key = provenance.key_of(sorted(pair.key for pair in pairs))
    folder = store.comparison_folder(folder_of(s.paths.results), run_key)
    found = Planned(s, asked, base, pairs, run_key, folder, warnings)
    check_memory(found, at_most=1)  # pipeline.placement starts more than one only where they fit
    return found


def beside(comparison: Planned, variants: Sequence[Member]) -> Planned:
    """The same comparison of the base with other variants; what is finished of these is looked up.

    Raises:
        StoreError: as `planned`.
    """
    pairs = [_pair(comparison.settings, comparison.asked, comparison.base, v) for v in variants]
    return replace(comparison, pairs=pairs)


def begin(comparison: Planned) -> Planned:
    """Make the folders and fix the pairs' plans; from here on it counts as begun.

    Raises:
        StoreError, StorageFailure: a folder or a plan cannot be written.
    """
    folders = [comparison.folder, *(pair.folder for pair in comparison.pairs)]
    if comparison.asked.protocol.begins(comparison.asked.stream.tokens.size) is not None:
        members = [comparison.base, *(pair.variant for pair in comparison.pairs)]
        folders += [states_folder(comparison.states, model.sha256) for model in members]
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"{folder}: cannot be created: {error.strerror}", "check paths.results"
            ) from error
    pairs = []
    for pair in comparison.pairs:
        fixed = store.fix_plan(pair.folder, pair.plan)
        if int(fixed["windows_per_shard"]) != pair.windows_per_shard:  # another driver was faster
            pair = _pair(comparison.settings, comparison.asked, comparison.base, pair.variant)
        pairs.append(pair)
    return replace(comparison, pairs=pairs)


def tasks(comparison: Planned) -> list[Task]:
    """What is left, in the order of windows: each shard with the pairs that lack it.

    Tasks with the same pairs share a spec and stand together in the executor's queue, for a worker that goes
    from one to the other has nothing to open.
    """
    specs: dict[tuple[int, tuple[str, ...]], CompareSpec] = {}
    found = []
    rank = np.argsort(comparison.order)
    for shard, pairs in sorted(
        _lacking(comparison.pairs), key=lambda item: rank[item[0].first_window : item[0].end].min()
    ):
        name = pairs[0].windows_per_shard, tuple(pair.key for pair in pairs)
        if name not in specs:
            specs[name] = _spec(comparison, pairs)
        found.append(Task(specs[name], shard, " ".join([str(name[0]), *name[1]])))
    return found


def _made(name: str, path: Path, settings: CompareSettings, asked: Asked, files: ExitStack) -> Member:
    file: engine.GGUFFile = open_variant(str(path), asked.file, asked.tokenizer, files)
    return replace(member(file, name, settings.engine, Path(settings.paths.cache)), type=name)


def _pair(s: CompareSettings, asked: Asked, base: Member, variant: Member) -> Pair:
    """A pair as it lies in the results folder.

    Raises:
        StoreError: its plan is broken, or of another measure.
    """
    parts: list[Any] = [asked.measure, base.subject, variant.subject]
    key = provenance.key_of(parts if s.keep_tokens else [*parts, "sketches"])
    folder = store.tokens_folder(folder_of(s.paths.results), key)
    wanted: dict[str, Any] = {
        "run_key": key,
        "n_windows": asked.n_windows,
        "windows_per_shard": s.cluster.windows_per_shard,
        "measure": asked.measure,
        "base": base.subject,
        "variant": variant.subject,
        "keep_tokens": s.keep_tokens,
        "version": provenance.version(),
    }
    there: dict[str, Any] | None = store.read_plan(folder, wanted)
    if there is not None:
        _check_measure(folder, there.get("measure"), asked.measure)
    per_shard = int((there or wanted)["windows_per_shard"])
    shards = plan(asked.n_windows, per_shard, asked.protocol.begins(asked.stream.tokens.size))
    finished = store.finished_shards(folder, shards, key)
    return Pair(key, variant, folder, wanted | {"windows_per_shard": per_shard}, shards, finished)


def _check_measure(folder: Path, found: Any, wanted: dict[str, Any]) -> None:
    """Refuse rows of another measure; StoreError names the first field that differs."""
    known = found if isinstance(found, dict) else {}
    for name in [*wanted, *(known.keys() - wanted.keys())]:
        if known.get(name) != wanted.get(name):
            raise StoreError(
                f"{folder}: holds rows of another measure: {name} is {known.get(name)}, expected "
                f"{wanted.get(name)}; different measures are never compared",
                "move the folder away and run again",
            )


def _lacking(pairs: Sequence[Pair]) -> Iterator[tuple[Shard, list[Pair]]]:
    """Each shard that a pair lacks, with all that lack it and are cut like it."""
    for per_shard in dict.fromkeys(pair.windows_per_shard for pair in pairs):
        alike = [pair for pair in pairs if pair.windows_per_shard == per_shard]
        for shard in alike[0].shards:
            lacking = [pair for pair in alike if shard not in pair.finished.paths]
            if lacking:
                yield shard, lacking


def _spec(comparison: Planned, pairs: Sequence[Pair]) -> CompareSpec:
    s, asked, base = comparison.settings, comparison.asked, comparison.base
    return CompareSpec(
        run_key=comparison.run_key,
        model_path=base.path,
        model_sha256=base.sha256,
        tokens_path=str(asked.stream.tokens_path),
        tokens_sha256=asked.stream.sha256,
        counts_path=str(asked.stream.counts_path),
        bos_id=asked.bos_id,
        protocol=s.protocol,
        engine=s.engine,
        windows_per_shard=pairs[0].windows_per_shard,
        run_dir=str(comparison.folder),
        cache_dir=s.paths.cache,
        collect=s.cluster.collect,
        pairs=tuple(
            PairSpec(
                pair.key,
                pair.variant.path,
                pair.variant.sha256,
                str(pair.folder),
                identity(asked.measure, base.subject, pair.variant.subject),
                pair.variant.donor,
            )
            for pair in pairs
        ),
        keep_tokens=s.keep_tokens,
        wanted=wanted_model(asked.settings, base.sha256),
    )


def check_memory(comparison: Planned, at_most: int | None = None) -> None:
    """Refuse what will not fit into this host's memory; SettingsError names what does.

    Args:
        at_most: workers, where `cluster.workers` leaves that open.
    """
    left = list(_lacking(comparison.pairs))
    if not left:
        return
    abreast = n_abreast([shard for shard, _ in left])
    abreast = abreast if at_most is None else min(at_most, abreast)
    asked = comparison.asked
    capacity.check_run(
        asked.file, asked.settings, abreast, _shape(comparison), n_variants=_n_at_once(comparison)
    )


def worker_bytes(comparison: Planned, n_missing: int = 0) -> int:
    """What a worker allocates.

    Args:
        n_missing: variants that are still to be made, which it will have open as well.
    """
    asked = comparison.asked
    s, n_variants = asked.settings.engine, _n_at_once(comparison) + n_missing
    return capacity.worker_bytes(
        asked.file, s, s.batch_tokens, _shape(comparison)(s.batch_tokens), n_variants
    )


def _n_at_once(comparison: Planned) -> int:
    """The most variants that a worker has open at once."""
    return max((len(pairs) for _, pairs in _lacking(comparison.pairs)), default=0)


def _shape(comparison: Planned) -> Callable[[int], CacheShape]:
    """Of a worker's cache of one model, for a number of batch tokens."""
    s, asked = comparison.settings, comparison.asked
    todo = [pair.windows_per_shard for pair in comparison.pairs if pair.todo]
    per_shard = max(todo, default=s.cluster.windows_per_shard)
    return partial(cache_shape, asked.protocol, asked.stream.tokens.size, s.protocol, per_shard)
