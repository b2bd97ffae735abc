"""What is to blame for a red gate, and the sentence that says it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.regression.culprits import MOST_MOVED, MOST_TENSORS, culprits
from pipeline.regression.judge import judge
from pipeline.regression.limits import Limit
from tests.pipeline.planted import (
    PROVENANCE,
    baseline,
    compared,
    kld_of,
    nll_of,
    of_another_model,
    one_bit_off,
    parted,
    scored,
    sha,
    timed,
)

BITS = Limit("nll_sha256", "equal", 1)
FILE = Limit("model_sha256", "equal", 1)
PAIRED = Limit("ln_ppl", "effect", 0.005, 0.99)
SHARE = Limit("fma_share", "fall", 0.15)


def blamed(limits, now, then, **today):
    """The one culprit, after the gates were judged."""
    known = None if then is None else baseline(then)
    engines = (PROVENANCE["engine_digest"], today.get("engine_digest", PROVENANCE["engine_digest"]))
    gates = judge({now.check: limits}, [now], known, engines)
    (found,) = culprits(gates, [now], known, PROVENANCE | today)
    assert (found.name, found.variant, found.data) == now.id
    assert found.metrics == list(dict.fromkeys(gate.metric for gate in gates if gate.passed is False))
    return found


def test_one_bit_of_one_weight_is_named():
    then = scored()
    found = blamed([FILE, BITS, PAIRED], one_bit_off(then), then)
    assert found.metrics == ["model_sha256"]
    assert found.tensors == ["blk.7.ffn_down.weight"]
    assert (found.window, found.layer) == (0, "blk.7.ffn_down")
    assert found.differs == {"model_sha256": (sha("model"), sha("another model"))}
    assert found.windows[0]["window"] == 3
    assert found.sentence == (
        "pydoc: scores of 8 of 8 windows changed, ln PPL by +5.3e-06; the model file is another one: "
        "1 of 272 tensors differs, blk.7.ffn_down.weight; first parts at blk.7.ffn_down in window 0; "
        "window 3 explains 94 % of it"
    )


def test_a_bit_that_changes_no_score_is_said_so():
    then = scored()
    now = of_another_model(replace(then, tensors=dict(then.tensors) | {"blk.0.ffn_down.weight": sha("x")}))
    assert blamed([FILE], now, then).sentence == (
        "pydoc: no score changed; the model file is another one: 1 of 272 tensors differs, "
        "blk.0.ffn_down.weight; no output of the traced windows 0, 4 changed"
    )
    found = blamed([FILE], of_another_model(then), then)
    assert (
        "the model file is another one, though all its tensors are the same: its metadata changed"
        in found.sentence
    )


def test_numerics_not_raised_is_narrowed_down_to_a_layer():
    then = scored()
    now = scored(nll_of(then) + 1e-9, layers=parted(then, "blk.3.attn_q"))
    found = blamed([BITS, PAIRED], now, then, engine_digest="2" * 16, git_sha="b" * 40)
    assert found.layer == "blk.3.attn_q"
    assert found.tensors == []
    assert found.differs == {"git_sha": ("a" * 40, "b" * 40), "engine_digest": ("1" * 16, "2" * 16)}
    assert found.sentence == (
        "pydoc: scores of 8 of 8 windows changed, ln PPL by +3.9e-12; the engine's sources are others "
        "(git_sha bbbbbbbbbbbb..., was aaaaaaaaaaaa...), engine.NUMERICS was not raised; first parts at "
        "blk.3.attn_q in window 0; no window explains more than 12 % of it"
    )


def test_the_same_model_and_engine_leave_the_machine():
    then = scored()
    now = scored(nll_of(then) + 1e-9, layers={})
    found = blamed([BITS], now, then, cpu="Xeon")
    assert found.sentence.endswith(
        "model and engine are the same; no window explains more than 12 % of it; "
        "another machine: cpu Xeon, was EPYC 9004"
    )
    assert blamed([BITS], now, then).sentence.endswith("; the same machine")


def test_only_windows_that_both_traced_are_looked_at_the_first_first():
    then = scored()
    layers = parted(then, "blk.8.attn_q")
    now = scored(nll_of(then) + 1, layers={4: layers[4], 2: layers[0]})
    found = blamed([BITS], now, then)
    assert (found.window, found.layer) == (4, "blk.8.attn_q")


def test_a_worse_variant_is_named_with_its_windows_and_documents():
    then = compared()
    kld = kld_of(then) * np.array([1, 1, 1, 1, 1, 1, 1, 1, 3, 1, 1, 9])
    now = of_another_model(compared(kld=kld))
    found = blamed([Limit("kld_mean", "rise", 0.1), Limit("kld_mean", "effect", 0.001, 0.5)], now, then)
    assert found.sentence.startswith("ladder q4_k_m wikitext2: kld_mean is ")
    assert "; the model file is another one; window 11 explains " in found.sentence
    moved = (kld - kld_of(then))[[11, 8]]
    assert [each["window"] for each in found.windows] == [11, 8]
    assert [each["kld_diff"] * 255 for each in found.windows] == pytest.approx(moved)
    assert [each["nll_diff"] for each in found.windows] == [0.0, 0.0]
    assert [each["share"] for each in found.windows] == pytest.approx(moved / moved.sum())
    assert [(each["document"], each["n_windows"]) for each in found.documents] == [(3, 3), (2, 3)]
    assert found.documents[0]["kld_diff"] == pytest.approx(moved[0] / 3 / 255)


def test_at_most_five_windows_and_a_document_where_no_window_stands_out():
    then = compared()
    change = np.array([0.1, 0.1, 0.1, 0.2, 0.1, 0.1, 3.0, 2.9, 3.1, 0.1, 0.1, -3.0])
    now = compared(nll=nll_of(then) + change)
    found = blamed([Limit("ln_ppl", "effect", 0.001, 0.5), Limit("kld_mean", "at_most", 0.001)], now, then)
    assert [each["window"] for each in found.windows] == [8, 6, 11, 7, 3]
    assert len(found.windows) == MOST_MOVED
    assert found.windows[2]["nll_diff"] == pytest.approx(-3.0 / 255)
    assert found.sentence.endswith("document 2 explains 72 % of it; the same machine")


def test_ln_ppl_is_told_in_nats_and_a_figure_with_its_limit():
    then = scored()
    now = of_another_model(scored(nll_of(then) + np.linspace(6, 12, 8)))
    found = blamed([PAIRED, Limit("ppl", "rise", 0.002)], replace(now, tensors={}), then)
    assert found.sentence.startswith("pydoc: ln PPL is 0.035 worse, ppl is ")
    assert "(+3.59 %, limit <= 1.002 x baseline); the model file is another one; " in found.sentence


def test_many_tensors_are_counted():
    then = scored()
    now = of_another_model(scored(nll_of(then) + 9, tensors={name: sha(name) for name in then.tensors}))
    found = blamed([PAIRED], now, then)
    assert len(found.tensors) == MOST_TENSORS + 1
    assert found.tensors[-1] == "and 252 more"
    assert "272 of 272 tensors differ, blk.0.ffn_down.weight, blk.1." in found.sentence
    fewer = of_another_model(replace(then, tensors=dict(list(then.tensors.items())[1:])))
    assert blamed([FILE], fewer, then).tensors == ["blk.0.ffn_down.weight"]


def test_other_number_types_and_raised_numerics_are_told():
    now = scored(subject=dict(scored().subject) | {"kv_type": "f16", "numerics": 2})
    found = blamed([Limit("ppl", "at_most", 5)], now, scored(), numerics=2)
    assert found.differs == {"kv_type": ("f32", "f16"), "numerics": (1, 2)}
    assert "; kv_type is f16 and was f32; engine.NUMERICS is 2 and was 1; " in found.sentence


def test_a_slower_gemm_is_told_from_a_slower_machine():
    gemm = blamed([SHARE], timed(speed=690), timed(), engine_digest="2" * 16)
    assert gemm.sentence == (
        "speed smollm2 ppl512: fma_share is 0.552 and was 0.8 (-31 %, limit >= 0.85 x baseline), 690 tokens "
        "a second and 1000 then (-31 %); the machine's ceiling of arithmetic did not move; the engine's "
        "sources are others; the same machine"
    )
    machine = blamed([Limit("tok_per_s", "fall", 0.1)], timed(speed=500, ceiling=0.5), timed(), host="two")
    assert machine.sentence == (
        "speed smollm2 ppl512: tok_per_s is 500 and was 1000 (-50 %, limit >= 0.9 x baseline); the machine's "
        "ceiling of arithmetic moved too (-50 %); model and engine are the same; another machine: host two, "
        "was one"
    )
    assert (machine.windows, machine.layer) == ([], None)


def test_a_ceiling_that_moves_from_round_to_round_did_not_move():
    """Five rounds beside other work, as they were seen: medians 3.4 % apart, and ranges that overlap."""

    def with_ceilings(speed, ceilings):
        shares = [speed / each for each in ceilings]
        return replace(timed(), samples={"tok_per_s": [speed] * 5, "fma_share": shares})

    then = with_ceilings(364.0, [431.0, 430.0, 430.0, 432.0, 432.0])
    said = "the machine's ceiling of arithmetic did not move by more than between rounds"
    assert said in blamed([SHARE], with_ceilings(280.0, [416.0, 416.0, 435.0, 401.0, 400.0]), then).sentence
    apart = blamed([SHARE], with_ceilings(280.0, [416.0, 416.0, 420.0, 401.0, 400.0]), then).sentence
    assert "the machine's ceiling of arithmetic moved too (-3.48 %)" in apart
    medians = {"tok_per_s": 280.0, "fma_share": 280 / 416}
    alone = blamed([SHARE], replace(timed(), samples={}, metrics=medians), then).sentence
    assert "the machine's ceiling of arithmetic moved too (-3.48 %)" in alone


def test_without_a_baseline_there_is_nothing_to_narrow_down():
    found = blamed([Limit("ppl", "at_most", 5)], scored(), None)
    assert found.sentence == "pydoc: ppl is 16.91 (limit <= 5); there is no baseline of it to say why"
    unknown = blamed([Limit("ppl", "at_most", 5)], scored(metrics={}), None)
    assert unknown.sentence == "pydoc: ppl is not known; there is no baseline of it to say why"


def test_what_was_not_measured_is_a_culprit_too():
    gates = judge({"pydoc": [Limit("ppl", "at_most", 20)]}, [], None, (None, None))
    (found,) = culprits(gates, [], None, PROVENANCE)
    assert found.sentence == "pydoc: ppl was not measured, which keeps no limit"


def test_green_gates_have_no_culprit_and_each_red_measurement_has_its_own():
    limits = {"speed": [SHARE], "pydoc": [BITS, FILE]}
    then, now = ([timed(test, speed) for test in ("ppl512", "tg64", "pp8")] for speed in (1000, 800))
    now[1] = timed("tg64", 990)
    known = baseline(scored(), *then)
    gates = judge(limits, [scored(), *now], known, ("1", "1"))
    found = culprits(gates, [scored(), *now], known, PROVENANCE)
    assert [each.data for each in found] == ["ppl512", "pp8"]
