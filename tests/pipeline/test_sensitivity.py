"""Groups of a variant's tensors in the base's place: the same bits as a file that has them, ranked, mixed."""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from make_gguf import tiny_llama
from make_mamba_gguf import tiny_mamba
from rich.console import Console

import engine
from pipeline.compare import compare, proposal, sensitivity, swaps
from pipeline.compare.report import Pairs, markdown, terminal
from pipeline.compare.settings import CompareSettings, OnTheSpotSettings, SensitivitySettings, StopSettings
from pipeline.compare.swaps import Group
from pipeline.compare.worker import CompareWorker
from pipeline.errors import RefusedError, ScoreError, SettingsError
from pipeline.quantize import quantize
from pipeline.quantize.settings import QuantizeChoices, QuantizeSettings
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    EngineSettings,
    ModelSettings,
    PathsSettings,
    ProtocolSettings,
    TrackingSettings,
)
from pipeline.store import tokens_folder

TEXT = "The quick brown fox jumps over the lazy dog, and — as ever — nobody asks why. " * 3
BITS = ("nll_base", "nll", "kld", "top_base", "top")


@pytest.fixture(autouse=True)
def _no_page(monkeypatch):
    monkeypatch.setattr(
        "pipeline.compare.report.write", lambda summary, pairs, folder, tokenizer: folder / "report.html"
    )


@pytest.fixture
def make(tmp_path):
    """Settings of a comparison of a tiny model with random weights; its Q4_0 is `q4_0.gguf`."""
    (tmp_path / "t.txt").write_text(TEXT)
    tiny_llama(tmp_path / "base.gguf")

    def settings(variant="Q4_0", results="results", base="base.gguf", groups=(), **more):
        asked = {key: more.pop(key) for key in ("by", "target_bytes", "target_bpw") if key in more}
        return CompareSettings(
            **{
                "base": ModelSettings(str(tmp_path / base)),
                "variants": [str(variant)],
                "data": DataSettings(path=str(tmp_path / "t.txt")),
                "protocol": ProtocolSettings(window=32),
                "cluster": ClusterSettings("inline", windows_per_shard=3),
                "tracking": TrackingSettings("none"),
                "paths": PathsSettings(str(tmp_path / results), str(tmp_path / "cache")),
                "sensitivity": SensitivitySettings(groups=list(groups), **asked),
                **more,
            }
        )

    return settings


def written(source, out, type_name, rules):
    """The path of a file that `quantize` made."""
    quantize(
        QuantizeSettings(
            ModelSettings(str(source)),
            QuantizeChoices(type_name, str(out), tensor_types=rules, allow_requantize=True),
        )
    )
    return out


def shards(folder, pair_key):
    return sorted(tokens_folder(Path(folder), pair_key).glob("shard-*.parquet"))


def bits(folder, pair_key):
    tables = [pq.read_table(path, columns=list(BITS), partitioning=None) for path in shards(folder, pair_key)]
    return [table.to_pydict() for table in tables]


def tensor_bytes(path):
    with engine.open(str(path)) as file:
        return sum(tensor.n_bytes for tensor in file.tensors.values())


def by_group(summary):
    return {entry["group"]: entry for entry in summary["sensitivity"]}


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_a_swap_and_a_mixture_have_the_bits_of_a_file_with_those_tensors(make, tmp_path, architecture):
    if architecture == "mamba":
        tiny_mamba(tmp_path / "base.gguf")
    kind = {"llama": "ffn_down", "mamba": "ssm_out"}[architecture]
    s = compare(make(groups=[kind, "ssm_in|attn_[qk]"], target_bpw=31)).summary
    assert s["exit_code"] == 0, s["error"]
    swapped = by_group(s)[kind]
    path = written(tmp_path / "base.gguf", tmp_path / "swap.gguf", "F32", [f"{kind}=Q4_0"])
    plain = compare(make(path, results="other")).summary
    [told] = plain["variants"]
    assert bits(tmp_path / "results", swapped["pair_key"]) == bits(tmp_path / "other", told["pair_key"])
    for name in ("kld_mean", "kld_stderr_clustered", "ln_ratio", "same_top"):
        assert swapped[name] == told[name]
    assert swapped["bytes_saved"] == tensor_bytes(tmp_path / "base.gguf") - tensor_bytes(path)
    mixture = s["mixture"]
    path = written(tmp_path / "base.gguf", tmp_path / "mix.gguf", mixture["type"], mixture["tensor_types"])
    [told] = compare(make(path, results="other")).summary["variants"]
    assert bits(tmp_path / "results", mixture["pair_key"]) == bits(tmp_path / "other", told["pair_key"])
    assert mixture["bpw"] == told["bpw"]
    assert mixture["bytes"] == pytest.approx(told["bytes"], abs=64), "metadata and padding are estimated"
    words = shlex.split(mixture["command"])
    assert words[:2] == ["pagemill", "quantize"]
    rules = OverridesParser.create().parse_overrides([w for w in words if "tensor_types" in w])[0].value()
    assert [str(rule) for rule in rules] == mixture["tensor_types"]
    assert "allow_requantize" not in mixture["command"], "the base is F32"
    assert mixture["bytes"] <= mixture["target_bytes"]
    assert mixture["kld_expected"] == sum(by_group(s)[name]["kld_mean"] for name in mixture["groups"])


def test_groups_are_ranked_and_add_up(make, tmp_path):
    s = compare(make(by="group", target_bytes=150_000)).summary
    found = s["sensitivity"]
    assert {entry["group"] for entry in found} == set(
        "token_embd attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()
    )
    per_mb = [entry["kld_per_mb"] for entry in found]
    assert per_mb == sorted(per_mb, reverse=True)
    assert min(entry["kld_mean"] for entry in found) > 0
    for entry in found:
        assert entry["kld_per_mb"] == pytest.approx(1e6 * entry["kld_mean"] / entry["bytes_saved"])
        assert entry["n_tensors"] == (1 if entry["group"] == "token_embd" else 2)
    assert s["additivity"]["kld_sum"] == pytest.approx(sum(entry["kld_mean"] for entry in found))
    assert s["additivity"]["kld_together"] == s["variants"][0]["kld_mean"]
    saved = tensor_bytes(s["base"]["path"]) - tensor_bytes(s["variants"][0]["path"])
    assert sum(entry["bytes_saved"] for entry in found) == saved
    assert s["mixture"]["beside"] == []
    names = [path.name for path in (tmp_path / "results/v1/table=comparisons").iterdir()]
    assert names == [f"run_key={s['run_key']}"], "swaps leave no comparison of their own"
    assert not list(Path(s["table"]).glob(".states*"))
    assert compare(make("Q8_0")).summary["sensitivity"] is None
    again = compare(make(by="group", target_bytes=150_000)).summary
    beside = again["mixture"]["beside"]
    assert [row["name"] for row in beside] == ["Q8_0"], "the next smaller; nothing larger was compared"


def test_pairs_are_stored_reused_and_resumed(make, tmp_path):
    first = compare(make(groups=["attn_v", "ffn_up"])).summary
    files = {path: path.stat().st_ino for path in (tmp_path / "results/v1/table=tokens").rglob("*.parquet")}
    lost = shards(tmp_path / "results", by_group(first)["attn_v"]["pair_key"])[1]
    lost.unlink()
    second = compare(make(groups=["ffn_down", "attn_v", "ffn_up"], results="results")).summary
    for name, entry in by_group(first).items():
        assert by_group(second)[name] == entry, "the same, to the bit"
    kept = {path: path.stat().st_ino for path in files if path != lost}
    assert kept == {path: inode for path, inode in files.items() if path != lost}
    assert lost.exists()
    row = pq.read_table(lost, partitioning=None).slice(0, 1).to_pylist()[0]
    base, variant = first["base"]["model_sha256"], first["variants"][0]["model_sha256"]
    assert (row["variant_model_sha256"], row["variant_swapped_from"]) == (base, variant)
    assert len(row["variant_swapped_names"]) == 64
    assert row["variant_subject_key"] != row["base_subject_key"]


def test_rounds_workers_shards_and_kept_tokens_do_not_matter(make, tmp_path, monkeypatch):
    rounds = []
    opened = CompareWorker._open
    monkeypatch.setattr(
        CompareWorker, "_open", lambda self, spec: (rounds.append(len(spec.pairs)), opened(self, spec))[1]
    )
    one = compare(make(by="layer")).summary
    assert rounds == [1, 3], "the variant; blk.0, blk.1 and token_embd"
    monkeypatch.setattr(sensitivity, "MOST_AT_ONCE", 2)
    two = compare(
        make(
            by="layer",
            results="two",
            cluster=ClusterSettings("inline", windows_per_shard=1),
            engine=EngineSettings(threads=2, batch_tokens=48),
            keep_tokens=False,
        )
    ).summary
    assert rounds == [1, 3, 1, 2, 1]
    for name, entry in by_group(one).items():
        other = by_group(two)[name]
        assert other["kld_by_position"] is None
        for key in ("kld_mean", "kld_stderr_clustered", "ln_ratio", "same_top", "bytes_saved"):
            assert other[key] == entry[key]


def test_as_many_at_once_as_memory_holds(monkeypatch):
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Stage:
        pairs: list

    def held(most):
        def check(stage):
            if len(stage.pairs) > most:
                raise SettingsError("too much")

        return check

    for most, sizes in ((99, [16, 4]), (5, [4] * 5), (1, [1] * 20)):
        monkeypatch.setattr(sensitivity, "check_memory", held(most))
        assert [len(some.pairs) for some in sensitivity._rounds(Stage(list(range(20))))] == sizes
    monkeypatch.setattr(sensitivity, "check_memory", held(0))
    with pytest.raises(SettingsError, match="too much"):
        sensitivity._rounds(Stage([1, 2]))


def test_mamba_that_carries_its_state_tells_whether_it_drifts(make, tmp_path):
    tiny_mamba(tmp_path / "base.gguf")
    s = compare(
        make(
            groups=["ssm_out", "ssm_in"],
            protocol=ProtocolSettings("carry", 32, limit=6),
            cluster=ClusterSettings("inline", windows_per_shard=2),
        )
    ).summary
    entry = by_group(s)["ssm_out"]
    found = [row for table in bits(tmp_path / "results", entry["pair_key"]) for row in table["kld"]]
    windows = np.repeat(np.arange(len(found)), [len(row) for row in found])
    kld, x = np.concatenate(found), np.arange(windows.size, dtype=float)
    design = np.stack([np.ones(x.size), x - x.mean()], axis=1)
    coefficients, *_ = np.linalg.lstsq(design, kld, rcond=None)
    scores = np.stack([np.bincount(windows, c * (kld - design @ coefficients)) for c in design.T], axis=1)
    bread = np.linalg.inv(design.T @ design)
    cov = len(found) / (len(found) - 1) * bread @ scores.T @ scores @ bread
    slope = entry["kld_by_position"]
    assert slope["nats_per_1000_tokens"] == pytest.approx(1000 * coefficients[1], rel=1e-9)
    assert slope["stderr"] == pytest.approx(1000 * np.sqrt(cov[1, 1]), rel=1e-9)
    assert 0 < slope["p"] < 1
    assert not list(Path(s["table"]).glob(".states*"))
    whole = compare(
        make(
            groups=["ssm_out"],
            results="whole",
            protocol=ProtocolSettings("carry", 32, limit=6),
            cluster=ClusterSettings("inline", windows_per_shard=6),
        )
    ).summary
    assert by_group(whole)["ssm_out"]["kld_by_position"] == slope


def test_shards_set_aside_are_named_and_what_is_finished_stays(make, monkeypatch):
    run = CompareWorker.run

    def fails(self, shard):
        if any(
            pair.donor is not None and pair.donor.tensors[0].endswith("attn_v.weight")
            for pair in self.spec.pairs
        ):
            raise ScoreError("no number", "none")
        return run(self, shard)

    monkeypatch.setattr(CompareWorker, "run", fails)
    monkeypatch.setattr(sensitivity, "MOST_AT_ONCE", 1)
    s = compare(make(groups=["ffn_up", "attn_v"])).summary
    assert (s["exit_code"], s["sensitivity"]) == (3, None)
    assert "of attn_v: ScoreError: no number" in s["error"]["message"]
    assert s["variants"][0]["kld_mean"] > 0
    monkeypatch.setattr(CompareWorker, "run", run)
    assert compare(make(groups=["ffn_up", "attn_v"])).summary["exit_code"] == 0


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"groups": ["attn_w"]}, "'attn_w' is found in no tensor's name of .*did you mean attn_"),
        ({"groups": ["attn_", "attn_v"]}, "'attn_v' is found only in tensors of 'attn_'"),
        ({"groups": ["attn_("]}, "'attn_\\(' is no regular expression"),
        ({"groups": [""]}, "an empty expression"),
        ({"groups": ["output_norm"]}, "has the same chosen tensors as .*nothing to swap"),
        ({"by": "row"}, "sensitivity.by=row is not known"),
        ({"by": "group", "variants": ["Q4_0", "Q8_0"]}, "of one variant, and there are 2; choose one"),
        ({"by": "group", "stop": StopSettings("decided")}, "stop.name=decided"),
        ({"target_bytes": 10}, "target_bytes=10: out of reach: .* save"),
        ({"target_bpw": 40.0}, "target_bpw=40, .* out of reach"),
        ({"target_bpw": -1.0}, "target_bpw=-1.0 is no size"),
        ({"target_bytes": 10, "target_bpw": 4.0}, "both set; give one"),
    ],
)
def test_refusals(make, tmp_path, asked, message):
    with pytest.raises(RefusedError, match="(?s)" + message) as caught:
        compare(make(**asked))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "results/v1").exists()


def test_the_base_itself_and_logits_are_refused(make, tmp_path):
    with pytest.raises(SettingsError, match="has the same tensors as"):
        compare(make(tmp_path / "base.gguf", by="group"))
    checked = SimpleNamespace(
        settings=make(by="group"), base=SimpleNamespace(type="16-bit logits", path="x.kld")
    )
    with pytest.raises(SettingsError, match=r"x\.kld holds logits"):
        sensitivity.check(checked)


def test_what_is_equal_is_left_out_and_said(make, tmp_path):
    path = written(tmp_path / "base.gguf", tmp_path / "v.gguf", "F32", ["attn_v=Q8_0", "blk.0.ffn_up=Q4_0"])
    told = compare(make(path, groups=["attn_q", "attn_v", "ffn_up"], dry_run=True)).summary["sensitivity"]
    assert [(e["group"], e["n_tensors"]) for e in told] == [("attn_v", 2), ("ffn_up", 1)]
    s = compare(make(path, groups=["attn_q", "attn_v"])).summary
    assert [e["group"] for e in s["sensitivity"]] == ["attn_v"]
    assert any("the same in base and variant: attn_q" in w for w in s["warnings"])
    assert s["additivity"] is None, "ffn_up differs too"
    assert compare(make("Q5_1", by="tensor", dry_run=True)).summary["sensitivity"] is None, "not made yet"


def test_larger_tensors_save_nothing_and_come_last(make, tmp_path):
    tiny_llama(tmp_path / "q.gguf", type_name="Q8_0")
    path = written(tmp_path / "q.gguf", tmp_path / "v.gguf", "Q8_0", ["attn_v=F16", "attn_k=Q4_0"])
    s = compare(make(path, base="q.gguf", by="group", quantize=OnTheSpotSettings(True))).summary
    last = s["sensitivity"][-1]
    assert (last["group"], last["kld_per_mb"]) == ("attn_v", None)
    assert last["bytes_saved"] < 0
    with pytest.raises(SettingsError, match="out of reach"):
        compare(make(path, base="q.gguf", target_bytes=s["variants"][0]["bytes"] - 9000))


def test_a_tensor_is_in_the_first_group_and_layers_and_tensors_are_cut_from_groups(tmp_path):
    with engine.open(str(tiny_llama(tmp_path / "m.gguf"))) as file:

        def names(**asked):
            return {k: len(v) for k, v in swaps.grouped(SensitivitySettings(**asked), file).items()}

        assert names(groups=["attn_v", "attn_", "blk"]) == {"attn_v": 2, "attn_": 8, "blk": 8}
        assert names(by="layer") == {"token_embd": 1, "blk.0": 7, "blk.1": 7}
        assert names(by="layer", groups=["attn_v"]) == {"blk.0": 1, "blk.1": 1}
        assert names(by="tensor", groups=["ffn_up"]) == {"blk.0.ffn_up": 1, "blk.1.ffn_up": 1}
        assert len(names(by="tensor")) == 15


def test_the_cheapest_bytes_go_first_and_what_was_not_needed_comes_back():
    groups = [Group(n, (n,), saved) for n, saved in (("a", 100), ("b", 10), ("c", 1000), ("d", -5))]
    entries = [{"kld_mean": kld} for kld in (1.0, 0.01, 20.0, 0.001)]

    def names(needed):
        return [g.name for g in proposal.chosen(groups, entries, needed)]

    assert names(5) == ["b"]
    assert names(50) == ["a"], "b was taken first, and is not needed beside a"
    assert names(105) == ["a", "b"]
    assert names(900) == ["c"]
    assert names(1110) == ["a", "b", "c"]


def test_the_recipe_names_layers_only_where_it_must(tmp_path):
    base = written(tiny_llama(tmp_path / "f.gguf"), tmp_path / "b.gguf", "Q8_0", ["token_embd=Q8_0"])
    mixed = written(base, tmp_path / "m.gguf", "Q8_0", [r"blk\.1\.attn_v=Q4_0", "ffn_up=F16"])
    with engine.open(str(base)) as one, engine.open(str(mixed)) as other:
        told = proposal.recipe(one, other)
    assert told["type"] == "Q8_0"
    assert r"^blk\.(0)\.attn_v\.weight$=Q8_0" in told["tensor_types"]
    assert r"^blk\.(1)\.attn_v\.weight$=Q4_0" in told["tensor_types"]
    assert r"^blk\.\d+\.ffn_up\.weight$=F16" in told["tensor_types"]
    path = written(base, tmp_path / "again.gguf", told["type"], told["tensor_types"])
    assert path.read_bytes() == mixed.read_bytes()


def told_summary(n_groups=3):
    """A summary as the job has it, with names that markup would mistake."""
    entries = [
        {"group": f"ffn|<{i}>*", "n_tensors": 2, "bytes_saved": 10**6 - i, "kld_mean": 0.5 / (i + 1),
         "kld_stderr_clustered": 0.01, "ln_ratio": 0.1, "ln_ratio_stderr_clustered": 0.02,
         "kld_per_mb": 0.5 / (i + 1), "kld_by_position": {"nats_per_1000_tokens": 0.5, "stderr": 0.1}}
        for i in range(n_groups)
    ]  # fmt: skip
    mixture = {
        "target_bytes": 9_000_000, "bytes": 8_900_000, "bpw": 4.25, "groups": ["ffn|<1>*"], "n_tensors": 2,
        "type": "Q8_0", "tensor_types": [r"^blk\.\d+\.ffn_up\.weight$=Q4_0"], "kld_expected": 0.25,
        "command": "pagemill quantize model.path=base.gguf",
        "kld_mean": 0.26, "kld_stderr_clustered": 0.01, "ln_ratio": 0.1, "ln_ratio_stderr_clustered": 0.02,
        "beside": [{"name": "Q4_K_M", "bytes": 9_100_000, "kld_mean": 0.3, "kld_stderr_clustered": 0.01}],
    }  # fmt: skip
    variant = {"name": "Q4_0", "type": "Q4_0", "bytes": 8_000_000, "bpw": 4.0, "kld_mean": 0.9, "ppl": 20.0}
    return {
        "base": {"name": "base", "path": "/models/base.gguf", "ppl": 19.0, "bytes": 10**7},
        "variants": [variant],
        "sensitivity": entries,
        "additivity": {"kld_sum": 0.91, "kld_together": 0.9, "ratio": 1.01},
        "kld_by_position": {"nats_per_1000_tokens": 0.5, "stderr": 0.1, "p": 0.001},
        "mixture": mixture,
    }


def test_terminal_and_markdown_tell_the_ranking_and_the_mixture():
    summary = told_summary(35)
    for width in (100, 45):
        console = Console(file=io.StringIO(), width=width)
        terminal.show(summary, "base", console)
        said = console.file.getvalue()
        assert "Which tensors need bits" in said
        assert "ffn|<0>*" in said
        assert "and 5 more, which are in the report" in said
        assert "pagemill quantize model.path=base.gguf" in said
        assert max(len(line) for line in said.splitlines() if not line.startswith("pagemill ")) <= width
    text = markdown.document(summary, "base", [])
    assert r"| ffn\|\<0\>\* | 2 | 1.00 MB | 0.500 ±0.010 |" in text
    assert "adding up the groups promised 0.25" in text
    assert "Q4_K_M 9.10 MB, mean KLD 0.300 ±0.010" in text
    assert "0.91 nats, and all together give 0.9" in text
    assert "it drifts" in text
    assert "Which tensors" not in markdown.document(summary | {"sensitivity": None}, "base", [])


def test_the_page_shows_them(monkeypatch):
    charts = pytest.importorskip("pipeline.compare.report.charts")
    from pipeline.compare.report import page, sections

    monkeypatch.setattr("pipeline.report.page._library", lambda: "")
    summary = told_summary()
    content = sections.gather(summary, Pairs("base", []), None)
    html = sections.sensitivity(content)
    assert html.count("<tr>") == 1 + 3
    assert html.count('data-value="0.5"') == 5, "a kld, its share of a MB, and three slopes"
    assert "ffn|&lt;0&gt;*" in html
    assert "<0>" not in html
    [spec] = content.pictures
    assert next(row["value"] for row in spec["layer"][0].get("data", spec["data"])["values"]) == 0.5
    assert charts.swaps([{**e, "kld_per_mb": None} for e in summary["sensitivity"]], {}) is None
    assert "Which tensors need bits" in page.render(summary, Pairs("base", []), None)
    assert sections.sensitivity(sections.gather(summary | {"sensitivity": None}, Pairs("b", []), None)) == ""
