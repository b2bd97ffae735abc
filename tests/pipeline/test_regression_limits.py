"""Limits as a suite's file says them: read, put into words, and refused all at once."""

from __future__ import annotations

import pytest

from pipeline.compare.settings import FIGURES
from pipeline.regression.limits import (
    DIGESTS,
    JOBS,
    KINDS,
    PAIRED,
    PRODUCED,
    Limit,
    in_force,
    limits_of,
)

TESTS, PEERS = ("ppl512", "tg64", "tg64@8"), ("llama_cpp",)


def read(job: str, told: dict) -> list[Limit]:
    limits, problems = limits_of("c", job, told, tests=TESTS, peers=PEERS)
    assert problems == []
    return list(limits)


def problems(job: str, told: dict) -> list[str]:
    return limits_of("c", job, told, tests=TESTS, peers=PEERS)[1]


def test_every_kind_is_read_and_said_in_words() -> None:
    told = {
        "ppl": {"at_most": 20, "at_least": 2, "rise": 0.002},
        "ln_ppl": {"effect": 0.005, "confidence": 0.99},
        "nll_sha256": {"equal": True},
    }
    limits = read("perplexity", told)
    assert [str(limit) for limit in limits] == [
        "<= 20",
        ">= 2",
        "<= 1.002 x baseline",
        "no rise by 0.005 or more (99 % confidence)",
        "= baseline",
    ]
    assert limits[3] == Limit("ln_ppl", "effect", 0.005, 0.99)
    speed = read("throughput", {"fma_share": {"fall": 0.15}})
    assert [str(limit) for limit in speed] == [">= 0.85 x baseline"]
    assert {limit.kind for limit in limits + speed} == set(KINDS)


@pytest.mark.parametrize(
    ("job", "metric", "told", "kind", "bound"),
    [
        ("perplexity", "ppl", "<=20", "at_most", 20),
        ("perplexity", "ppl", ">= 2.5", "at_least", 2.5),
        ("perplexity", "ppl", 20, "at_most", 20),
        ("compare", "same_top", 0.9, "at_least", 0.9),
        ("throughput", "ratio/llama_cpp", "0.5", "at_least", 0.5),
        ("perplexity", "ppl", {"rise": "0.2 %"}, "rise", 0.002),
        ("perplexity", " PPL", {"at_most": "3e1"}, "at_most", 30),
    ],
)
def test_a_number_means_the_worst_value_allowed(job, metric, told, kind, bound) -> None:
    [limit] = read(job, {metric: told})
    assert (limit.metric, limit.kind) == (metric.strip().lower(), kind)
    assert limit.bound == pytest.approx(bound)


def test_a_metric_may_be_of_one_test_and_to_one_peer() -> None:
    told = {"fma_share/tg64@8": {"fall": 0.3}, "ratio/llama_cpp": 0.4, "ratio/llama_cpp/tg64": 0.5}
    assert [(limit.name, limit.test) for limit in read("throughput", told)] == [
        ("fma_share", "tg64@8"),
        ("ratio/llama_cpp", None),
        ("ratio/llama_cpp", "tg64"),
    ]


def test_what_is_said_of_one_test_stands_in_for_what_is_said_of_all() -> None:
    limits = read(
        "throughput", {"fma_share": {"fall": 0.15}, "fma_share/tg64": {"fall": 0.3, "at_least": 0.1}}
    )
    assert [limit.bound for limit in in_force(limits, "ppl512")] == [0.15]
    assert [limit.bound for limit in in_force(limits, "tg64")] == [0.3, 0.1]
    assert in_force(read("perplexity", {"ppl": 3})) == [Limit("ppl", "at_most", 3.0)]


@pytest.mark.parametrize(
    ("job", "told", "expected"),
    [
        ("perplexity", {"plp": 3}, "did you mean ppl?"),
        ("perplexity", {"kld_mean": 1}, "a perplexity check has no kld_mean, compare has it"),
        ("throughput", {"ppl": 1}, "a throughput check has no ppl, perplexity and compare has it"),
        ("throughput", {"fma_share/ppl51": 0.1}, "there is no such test; did you mean ppl512?"),
        ("perplexity", {"ppl/ppl512": 3}, "expected ppl alone"),
        ("throughput", {"ratio": 1}, "names no peer"),
        ("throughput", {"ratio/llama_ccp": 1}, "did you mean llama_cpp?"),
        ("throughput", {"ratio/ik_llama_cpp": 1}, "ik_llama_cpp does not run; add it"),
        (
            "perplexity",
            {"byte_ppl": {"effect": 0.1}},
            "effect needs sums by window; of perplexity that is ln_ppl",
        ),
        ("throughput", {"fma_share": {"effect": 0.1}}, "of throughput that is nothing"),
        ("perplexity", {"ln_ppl": {"rise": 0.1}}, "rise is for ppl or nll_mean_nats"),
        ("perplexity", {"nll_sha256": {"at_most": 1}}, "at_most of a digest says nothing"),
        ("perplexity", {"nll_sha256": {"equal": False}}, "equal: False says nothing"),
        ("perplexity", {"ppl": {"equal": True}}, "equal is for digests (nll_sha256, model_sha256)"),
        ("perplexity", {"ppl": {"fall": 0.1}}, "less of ppl is better; expected rise"),
        ("throughput", {"fma_share": {"rise": 0.1}}, "more of fma_share is better; expected fall"),
        ("compare", {"ln_ratio": {"rise": 0.1}}, "ln_ratio may be on either side of 0"),
        ("perplexity", {"ppl": {"rise": 15}}, "is no fraction from 0 to 1; 15 % is 0.15"),
        ("perplexity", {"ppl": {"rise": -0.1}}, "is no fraction from 0 to 1"),
        ("perplexity", {"ppl": {"at_most": "x"}}, "at_most: x is no number"),
        ("perplexity", {"ppl": {"at_most": float("nan")}}, "is no number"),
        ("perplexity", {"ppl": {"atmost": 3}}, "atmost is no kind of limit; did you mean at_most?"),
        ("perplexity", {"ppl": "<20"}, "write '<=20'"),
        ("perplexity", {"ppl": "20 nats"}, "20 nats is no limit"),
        ("perplexity", {"ppl": True}, "True is no limit"),
        ("perplexity", {"ppl": {}}, "says nothing"),
        ("perplexity", {"ln_ppl": {"effect": 0}}, "expected the smallest difference that matters"),
        ("perplexity", {"ln_ppl": {"effect": 0.1, "confidence": 99}}, "confidence: 99 is none"),
        ("perplexity", {"ppl": {"at_most": 3, "confidence": 0.9}}, "confidence without effect"),
        ("perplexity", {"ppl": {"at_most": 3, "at_least": 4}}, "contradict each other: no value keeps both"),
        ("perplexity", {"ppl": 3, "PPL ": 4}, "limits.PPL  and limits.ppl are one metric"),
        (
            "throughput",
            {"fma_share": {"at_most": 0.5}, "fma_share/tg64": {"at_least": 0.6}},
            "fma_share/tg64 at_least 0.6 and limits.fma_share at_most 0.5 contradict",
        ),
    ],
)
def test_what_cannot_be_kept_or_broken_is_refused(job, told, expected) -> None:
    found = problems(job, told)
    assert len(found) == 1, found
    assert found[0].startswith("c: ")
    assert expected in found[0]


def test_rise_and_fall_of_one_metric_contradict() -> None:
    assert "fall would miss it getting worse" in " ".join(
        problems("perplexity", {"ppl": {"rise": 0.1, "fall": 0.1}})
    )


def test_all_problems_are_told_at_once() -> None:
    found = problems("perplexity", {"plp": 1, "ppl": {"rise": 3, "at_mst": 1}, "byte_ppl": {"at_most": 2}})
    assert len(found) == 3


def test_what_jobs_produce_is_known_once() -> None:
    for job in JOBS:
        names = (*PRODUCED[job], *DIGESTS[job])
        assert len(set(names)) == len(names)
    assert set(FIGURES) < set(PRODUCED["compare"])
    assert set(PAIRED["compare"]) == {"ln_ppl", "kld_mean"}
