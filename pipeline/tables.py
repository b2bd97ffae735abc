"""Arrow schemas of the result tables, written down: a unit or meaning in each field's metadata.

The tables live in hive folders `run_key=<16 hex>`; the key is the folder's name and stands in each file's
metadata, not in a column, because a reader of hive folders adds that column itself. Columns may be added,
nullable; anything else is another `SCHEMA_VERSION` and another `v<n>/` folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.compare.settings import FIGURES
from pipeline.redact import redacted

SCHEMA_VERSION = 1

_IDENTITY = {
    "measure_key": (pa.string(), "16 hex digits of the measure"),
    "subject_key": (pa.string(), "16 hex digits of the subject"),
    "data_sha256": (pa.string(), "SHA-256 of the data's bytes"),
    "tokens_sha256": (pa.string(), "SHA-256 of the token stream, int32 little-endian"),
    "protocol": (pa.string(), "name of the scoring protocol"),
    "protocol_version": (pa.int64(), "version of the scoring protocol"),
    "protocol_window": (pa.int64(), "tokens"),
    "protocol_limit": (pa.int64(), "windows; null: all"),
    "protocol_bos_id": (pa.int64(), "token id that begins each window; null: none"),
    "protocol_stride": (pa.int64(), "tokens; null: not of this protocol"),
    "data_documents": (pa.string(), "apart; null: joined, or only one"),
    "data_weights_sha256": (pa.string(), "SHA-256 of the documents' weights, float64; null: all alike"),
    "data_errors": (pa.string(), "replace; null: all bytes were UTF-8"),
    "model_sha256": (pa.string(), "SHA-256 of the model file"),
    "adapters": (pa.string(), "adapters applied, empty for none"),
    "kv_type": (pa.string(), "number type of the key/value cache"),
    "activation_type": (pa.string(), "number type of the activations"),
    "numerics": (pa.int64(), "engine.NUMERICS"),
}
_SUBJECT = ("subject_key", "model_sha256", "adapters", "kv_type", "activation_type", "numerics")
_MACHINE = {
    "version": (pa.string(), "version of pagemill"),
    "cpu": (pa.string(), "processor"),
    "threads": (pa.int64(), "threads of a worker"),
    "batch_tokens": (pa.int64(), "tokens"),
}
_WINDOWS = {
    "window": (pa.int64(), "rank of the window in the run"),
    "document": (pa.int64(), "rank of the document that holds the window's first token"),
    "n_scored": (pa.int64(), "tokens"),
    "nll_sum_nats": (pa.float64(), "nats"),
    "nll_sq_sum": (pa.float64(), "nats^2"),
    "n_bytes": (pa.int64(), "bytes of the scored tokens' text"),
    "n_words": (pa.int64(), "words that begin in the scored tokens, as the protocol counts them"),
    "weight": (pa.float64(), "weight of the window's document; null: all alike"),
    "distance": (pa.int64(), "tokens of its document before the window; null: windows begin anew"),
    "half_n_scored": (pa.int64(), "of n_scored, tokens that protocol windows scores; null: not asked"),
    "half_nll_sum_nats": (pa.float64(), "nats of those"),
    "half_nll_sq_sum": (pa.float64(), "nats^2 of those"),
    "n_tokens": (pa.int64(), "tokens read"),
    "first_token": (pa.int64(), "place in the token stream of the window's first token"),
    "shard": (pa.int64(), "first window of the shard"),
    "worker": (pa.string(), "host and process"),
    "host": (pa.string(), "host name"),
}
_RUNS = {
    "finished_at": (pa.timestamp("ns", tz="UTC"), "UTC"),
    "ok": (pa.bool_(), "all shards finished"),
    "exit_code": (pa.int64(), "0 done, 3 incomplete"),
    "error": (pa.string(), "what is missing"),
    "warnings": (pa.list_(pa.string()), "messages"),
    "sweep_key": (pa.string(), "16 hex digits of the sweep that the run was a point of; null: none"),
    "model_path": (pa.string(), "path"),
    "data_name": (pa.string(), "name of the data set"),
    "data_path": (pa.string(), "path or Python module"),
    "ppl": (pa.float64(), "perplexity per token"),
    "ppl_stderr": (pa.float64(), "one standard error, tokens independent"),
    "ppl_stderr_clustered": (pa.float64(), "one standard error, clustered by window"),
    "nll_mean_nats": (pa.float64(), "nats per token"),
    "bits_per_byte": (pa.float64(), "bits per byte of the scored text"),
    "byte_ppl": (pa.float64(), "perplexity per byte"),
    "word_ppl": (pa.float64(), "perplexity per word"),
    "half_ppl": (pa.float64(), "perplexity per token that protocol windows scores; null: not asked"),
    "half_ppl_stderr": (pa.float64(), "one standard error, tokens independent"),
    "half_ppl_stderr_clustered": (pa.float64(), "one standard error, clustered by window"),
    "half_nll_mean_nats": (pa.float64(), "nats per such token"),
    "half_n_scored": (pa.int64(), "such tokens scored"),
    "n_documents": (pa.int64(), "documents in the data"),
    "n_documents_short": (pa.int64(), "documents kept apart that are shorter than two tokens"),
    "n_windows": (pa.int64(), "windows"),
    "n_scored": (pa.int64(), "tokens scored"),
    "n_tokens": (pa.int64(), "tokens of all windows"),
    "nll_sha256": (pa.string(), "SHA-256 of nll_sum_nats in window order"),
    "tok_per_s": (pa.float64(), "tokens computed in this run per second of scoring"),
    "worker_busy_share": (pa.float64(), "of workers' time after their first shard, the part within shards"),
    "wall_s": (pa.float64(), "seconds"),
    "compile_s": (pa.float64(), "seconds, slowest worker"),
    "load_s": (pa.float64(), "seconds, slowest worker"),
    "load_mode": (pa.string(), "engine.load: how workers brought the model into memory"),
    "model_open_s": (pa.float64(), "seconds, slowest worker, of load_s in opening the model's files"),
    "n_workers": (pa.int64(), "processes that scored in this run"),
    "windows_per_shard": (pa.int64(), "windows"),
    "shards_done": (pa.int64(), "shards finished, reused ones included"),
    "shards_reused": (pa.int64(), "shards finished before this run"),
    "model_resident_bytes": (pa.int64(), "bytes of the model file in the page cache"),
    "model_pss_sum_bytes": (pa.int64(), "bytes, proportional set size of the mapping over all processes"),
    "model_rss_bytes_max": (pa.int64(), "bytes of the mapping resident in the worker with the most"),
    "model_locked_bytes": (pa.int64(), "bytes of the mapping locked, shares summed over all processes"),
    "anonymous_bytes_max": (pa.int64(), "bytes, largest worker"),
    "host": (pa.string(), "host name of the driver"),
    "cluster": (pa.string(), "kind of executor"),
    "git_sha": (pa.string(), "commit of the checkout"),
    "versions": (pa.string(), "JSON"),
    "settings": (pa.string(), "JSON, resolved"),
}

_THROUGHPUT = {
    "engine": (pa.string(), "pagemill, or a peer"),
    "engine_version": (pa.string(), "version of the engine"),
    "kind": (pa.string(), "perplexity, prompt, generate or batched"),
    "test": (pa.string(), "the test as llama-bench would call it"),
    "type": (pa.string(), "weight type of the model file"),
    "n_prompt": (pa.int64(), "tokens of a sequence's prompt, or of a window"),
    "n_generate": (pa.int64(), "tokens generated for each sequence"),
    "n_seqs": (pa.int64(), "sequences side by side, or windows"),
    "threads": (pa.int64(), "threads of the engine"),
    "tok_per_s": (pa.float64(), "tokens per second, median of the rounds"),
    "p10": (pa.float64(), "tokens per second, tenth percentile"),
    "p90": (pa.float64(), "tokens per second, ninetieth percentile"),
    "n": (pa.int64(), "rounds"),
    "tok_per_s_mean": (pa.float64(), "tokens per second"),
    "tok_per_s_stdev": (pa.float64(), "tokens per second, standard deviation of the rounds"),
    "samples": (pa.list_(pa.float64()), "tokens per second of each round"),
    "flop_per_token": (pa.float64(), "operations, counted from the model's shapes"),
    "fma_gflops": (pa.float64(), "GFLOP/s, ceiling of float32 multiply-adds between the rounds"),
    "fma_gflops_samples": (pa.list_(pa.float64()), "GFLOP/s, the same at the two ends of each round"),
    "fma_share": (pa.float64(), "of that ceiling"),
    "read_bytes_per_token": (pa.float64(), "bytes of weights"),
    "read_gb_per_s": (pa.float64(), "GB/s, bandwidth of reading memory between the rounds"),
    "read_gb_per_s_samples": (pa.list_(pa.float64()), "GB/s, the same at the two ends of each round"),
    "read_share": (pa.float64(), "of that bandwidth"),
    "kv_type": (pa.string(), "number type of the key/value cache"),
    "activation_type": (pa.string(), "number type of the activations; null: the engine's own business"),
    "options": (pa.string(), "JSON, settings of the engine"),
    "tried": (pa.string(), "JSON, settings tried and their tokens per second"),
    "engine_features": (pa.string(), "CPU features that the engine says it uses"),
    "load_s": (pa.float64(), "seconds to open the model"),
    "ready_s": (pa.float64(), "seconds from the start of opening to the first likelihoods"),
    "model_pss_bytes": (pa.int64(), "bytes, proportional set size of the model's mapping"),
    "anonymous_bytes": (pa.int64(), "bytes of the engine's process that no file backs"),
    "model": (pa.string(), "name of the model file"),
    "model_path": (pa.string(), "path"),
    "model_sha256": (pa.string(), "SHA-256 of the model file"),
    "model_bytes": (pa.int64(), "bytes of the model file"),
    "measured_at": (pa.timestamp("ns", tz="UTC"), "UTC"),
    "measure_key": (pa.string(), "16 hex digits of the measure"),
    "ok": (pa.bool_(), "all engines finished all tests of the command"),
    "case": (pa.string(), "what the machine has for products of bytes: amx, vnni, or f32 for neither"),
    "cpu": (pa.string(), "processor"),
    "features": (pa.list_(pa.string()), "vector features of the processor"),
    "host": (pa.string(), "host name"),
    "version": (pa.string(), "version of pagemill"),
    "numerics": (pa.int64(), "engine.NUMERICS"),
    "git_sha": (pa.string(), "commit of the checkout"),
    "versions": (pa.string(), "JSON"),
    "settings": (pa.string(), "JSON, resolved"),
}

_PAIRS = {
    **{name: field for name, field in _IDENTITY.items() if name not in _SUBJECT},
    **{
        f"{side}_{name}": (_IDENTITY[name][0], f"{_IDENTITY[name][1]}, {side}")
        for side in ("base", "variant")
        for name in _SUBJECT
    },
    "variant_swapped_from": (pa.string(), "SHA-256 of the file whose tensors are in the base's places"),
    "variant_swapped_names": (pa.string(), "SHA-256 of their names, sorted, a line each; null: none"),
    "base_format": (pa.string(), "of a base that is no model but its logits in a file; null: the model"),
}
_SQUARED = "nats^2"
_TOKENS = {
    "window": (pa.int64(), "rank of the window in the run"),
    "document": (pa.int64(), "rank of the document that holds the window's first token"),
    "first_token": (pa.int64(), "place in the token stream of the window's first token"),
    "first_scored": (pa.int64(), "place in the token stream of the first scored target"),
    "layers_s": (pa.float64(), "seconds of the variant's layers in its worker; its shard's, shared evenly"),
    "distance": (pa.int64(), "tokens of its document before the window; null: windows begin anew"),
    "n_tokens": (pa.int64(), "tokens read"),
    "n_scored": (pa.int64(), "tokens"),
    "n_bytes": (pa.int64(), "bytes of the scored tokens' text"),
    "n_words": (pa.int64(), "words that begin in the scored tokens, as the protocol counts them"),
    "nll_base_sum": (pa.float64(), "nats"),
    "nll_sum": (pa.float64(), "nats"),
    "nll_base_sq_sum": (pa.float64(), _SQUARED),
    "nll_sq_sum": (pa.float64(), _SQUARED),
    "nll_cross_sum": (pa.float64(), _SQUARED),
    "kld_sum": (pa.float64(), "nats, of the divergences of base from variant over the whole vocabulary"),
    "kld_sq_sum": (pa.float64(), _SQUARED),
    "kld_max": (pa.float64(), "nats"),
    "kld_min": (pa.float64(), "nats"),
    "dp_sum": (pa.float64(), "of dp, the target's probability by the variant less that by the base"),
    "dp_sq_sum": (pa.float64(), "of dp^2"),
    "dp_quad_sum": (pa.float64(), "of dp^4"),
    "dp_max": (pa.float64(), "of dp"),
    "dp_min": (pa.float64(), "of dp"),
    "n_same_top": (pa.int64(), "targets where both find the same token the most likely"),
    "nll_base": (pa.list_(pa.float64()), "nats of each target in order; null: keep_tokens=false"),
    "nll": (pa.list_(pa.float64()), "nats of each target in order; null: keep_tokens=false"),
    "kld": (pa.list_(pa.float32()), "nats of each target in order; null: keep_tokens=false"),
    "top_base": (pa.list_(pa.int32()), "most likely token of each target's place; null: keep_tokens=false"),
    "top": (pa.list_(pa.int32()), "most likely token of each target's place; null: keep_tokens=false"),
    **{
        f"{name}_{part}": (pa.list_(pa.int32()), f"{what}; null: tokens are kept")
        for name, of in (("kld", "kld"), ("dp", "dp"), ("nll_diff", "|nll - nll_base|"))
        for part, what in (
            ("keys", f"bins of {of} in rising order: upper 16 bits of a float32"),
            ("counts", f"targets in each bin of {of}"),
        )
    },
    "shard": (pa.int64(), "first window of the shard"),
    "worker": (pa.string(), "host and process"),
    "host": (pa.string(), "host name"),
}

_IMATRIX = {
    "names": (pa.list_(pa.string()), "weight matrices that are multiplied with one input"),
    "columns": (pa.int64(), "columns of those matrices"),
    "n_tokens": (pa.int64(), "tokens of the shard's windows"),
    "limbs": (
        pa.list_(pa.int64()),
        "squares of the input summed over tokens: l0, l1, l2 of each column, l0 + l1 2^-44 + l2 2^-88",
    ),
    "statistic": (pa.string(), "imatrix"),
    "shard": (pa.int64(), "first window of the shard"),
    "worker": (pa.string(), "host and process"),
    "host": (pa.string(), "host name"),
}

_COMPARISONS = {
    "finished_at": (pa.timestamp("ns", tz="UTC"), "UTC"),
    "ok": (pa.bool_(), "all shards finished, all limits kept"),
    "exit_code": (pa.int64(), "0 done, 1 a limit is broken, 3 incomplete"),
    "error": (pa.string(), "what is broken or missing"),
    "name": (pa.string(), "of the variant"),
    "type": (pa.string(), "file type of the variant, as llama.cpp calls it"),
    "bytes": (pa.int64(), "bytes of the variant's file"),
    "bpw": (pa.float64(), "bits per weight of the variant"),
    "variant_path": (pa.string(), "path"),
    "base_name": (pa.string(), "of the base"),
    "base_path": (pa.string(), "path"),
    "base_bytes": (pa.int64(), "bytes of the base's file"),
    "data_name": (pa.string(), "name of the data set"),
    "data_path": (pa.string(), "path or Python module"),
    "pair_key": (pa.string(), "run_key in table=tokens"),
    "n_windows": (pa.int64(), "windows that the figures are of"),
    "n_scored": (pa.int64(), "tokens scored"),
    **{name: (pa.float64(), "see pipeline/compare/statistics.py") for name in FIGURES},
    "p_vs_next": (pa.float64(), "of a difference to the next smaller variant, Holm; null: the smallest"),
    "stopped": (pa.bool_(), "windows were left out, since all neighbours were told apart"),
    "decided_at": (
        pa.int64(),
        "windows that told it from the next smaller variant; null: not asked, or never",
    ),
    "nll_sha256": (pa.string(), "SHA-256 of nll_sum in window order"),
    "kld_sha256": (pa.string(), "SHA-256 of kld_sum in window order"),
    "wall_s": (pa.float64(), "seconds, of the whole comparison"),
    "tok_per_s": (pa.float64(), "tokens per second, over all models"),
    "overhead": (pa.float64(), "wall time over that of separate perplexities, estimated; null: unknown"),
    "n_workers": (pa.int64(), "processes that scored in this run"),
    "host": (pa.string(), "host name of the driver"),
    "git_sha": (pa.string(), "commit of the checkout"),
    "versions": (pa.string(), "JSON"),
    "settings": (pa.string(), "JSON, resolved"),
}

_TEXTS = pa.map_(pa.string(), pa.string())
_REGRESSIONS = {
    "finished_at": (pa.timestamp("ns", tz="UTC"), "UTC"),
    "suite": (pa.string(), "name of the suite"),
    "check": (pa.string(), "name of the check in the suite"),
    "job": (pa.string(), "perplexity, compare or throughput"),
    "variant": (pa.string(), "name of the model, or of the variant"),
    "data": (pa.string(), "name of the data set, or the test of a speed"),
    "verdict": (pa.string(), "of the whole run: passed, regression, promoted or incomplete"),
    "ok": (pa.bool_(), "all checks of the suite were measured, whatever the verdict"),
    "broken": (pa.list_(pa.string()), "metrics of this row that are beyond their limits"),
    "baseline": (pa.string(), "what the run was judged against; null: nothing"),
    "metrics": (pa.map_(pa.string(), pa.float64()), "figures by name, as the job's JSON has them"),
    "bits": (_TEXTS, "digests by name"),
    "samples": (pa.map_(pa.string(), pa.list_(pa.float64())), "of a speed, each round's value of a metric"),
    "measure_key": (pa.string(), "16 hex digits of the measure"),
    "measure": (pa.string(), "JSON"),
    "subject_key": (pa.string(), "16 hex digits of the subject"),
    "subject": (pa.string(), "JSON"),
    "window": (pa.list_(pa.int64()), "rank of each window in the run; null: not by window"),
    "document": (pa.list_(pa.int64()), "rank of the document that holds the window's first token"),
    "first_token": (pa.list_(pa.int64()), "place in the token stream of the window's first token"),
    "n_scored": (pa.list_(pa.int64()), "tokens of each window"),
    "nll_sum": (pa.list_(pa.float64()), "nats of each window"),
    "kld_sum": (pa.list_(pa.float64()), "nats of each window; null: nothing was compared"),
    "layers": (
        pa.map_(pa.int64(), _TEXTS),
        "of traced windows: name of an output of the network, in order -> SHA-256 of its float32 bits",
    ),
    "tensors": (_TEXTS, "name of a tensor of the model file -> SHA-256 of its bytes"),
    "version": (pa.string(), "version of pagemill"),
    "numerics": (pa.int64(), "engine.NUMERICS"),
    "engine_digest": (pa.string(), "digest of all sources of the engine"),
    "git_sha": (pa.string(), "commit of the checkout"),
    "host": (pa.string(), "host name"),
    "cpu": (pa.string(), "processor"),
    "features": (pa.list_(pa.string()), "vector features of the processor"),
    "versions": (pa.string(), "JSON"),
    "settings": (pa.string(), "JSON, of each check"),
    "limits": (pa.string(), "JSON, of each check"),
}


def _schema(*groups: Mapping[str, tuple[pa.DataType, str]]) -> pa.Schema:
    fields = [
        pa.field(name, kind, metadata={"unit": unit})
        for group in groups
        for name, (kind, unit) in group.items()
    ]
    return pa.schema(fields, metadata={"pagemill.schema_version": str(SCHEMA_VERSION)})


WINDOWS_SCHEMA = _schema(_WINDOWS, _IDENTITY, _MACHINE)
"""`table=windows`: a row per window."""

RUNS_SCHEMA = _schema(_RUNS, _IDENTITY, _MACHINE)
"""`table=runs`: a row per invocation that ended, complete or not."""

THROUGHPUT_SCHEMA = _schema(_THROUGHPUT)
"""`table=throughput`: a row per engine, model and test of a benchmark."""

TOKENS_SCHEMA = _schema(_TOKENS, _PAIRS, _MACHINE)
"""`table=tokens`: a row per window of a pair, a base and one variant."""

IMATRIX_SCHEMA = _schema(_IMATRIX, _IDENTITY, _MACHINE)
"""`table=imatrix`: a row per input that weight matrices share, of a shard's windows."""

COMPARISONS_SCHEMA = _schema(_COMPARISONS, _PAIRS, _MACHINE)
"""`table=comparisons`: a row per variant of a comparison that ended, complete or not."""

REGRESSIONS_SCHEMA = _schema(_REGRESSIONS)
"""`table=regressions`: a row per measurement of a suite; a file is a whole run, and can be a baseline."""


def table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows -> a table of that schema; a column that a row does not have is null, and secrets are left out.

    Raises:
        ValueError: a row has a column that the schema does not.
    """
    for row in rows:
        if unknown := row.keys() - set(schema.names):
            raise ValueError(f"columns that are not in the schema: {', '.join(sorted(unknown))}")
    columns = [pa.array([_kept(row.get(field.name)) for row in rows], field.type) for field in schema]
    return pa.table(columns, schema=schema)


def _kept(value: Any) -> Any:
    """A text without secrets; lists are of numbers."""
    return redacted(value) if isinstance(value, str) else value
