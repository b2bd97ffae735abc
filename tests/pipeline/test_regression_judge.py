"""Limits are kept, broken or not judged as they say; what was planted is caught, another measure refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.errors import SettingsError
from pipeline.regression.judge import differing, judge, require_same_measures
from pipeline.regression.limits import Limit
from tests.pipeline.planted import (
    baseline,
    compared,
    kld_of,
    nll_of,
    of_another_model,
    one_bit_off,
    scored,
    sha,
    timed,
    with_measure,
)

SAME = ("1" * 16, "1" * 16)
OTHER_ENGINE = ("1" * 16, "2" * 16)

BITS = Limit("nll_sha256", "equal", 1)
FILE = Limit("model_sha256", "equal", 1)
PAIRED = Limit("ln_ppl", "effect", 0.005, 0.99)
SHARE = Limit("fma_share", "fall", 0.15)


def gate(limit, now, then, engines=SAME):
    """The one gate of a limit."""
    known = None if then is None else baseline(then)
    (found,) = judge({now.check: [limit]}, [now], known, engines)
    assert (found.name, found.variant, found.data) == now.id
    return found


@pytest.mark.parametrize(
    ("limit", "value", "passed"),
    [
        (Limit("ppl", "at_most", 20), 20.0, True),
        (Limit("ppl", "at_most", 20), 20.000001, False),
        (Limit("same_top", "at_least", 0.9), 0.9, True),
        (Limit("same_top", "at_least", 0.9), 0.89, False),
        (Limit("ppl", "rise", 0.25), 20.0, True),  # of a baseline of 16
        (Limit("ppl", "rise", 0.25), 20.01, False),
        (Limit("ppl", "rise", 0.25), 3.0, True),
        (Limit("tok_per_s", "fall", 0.25), 12.0, True),
        (Limit("tok_per_s", "fall", 0.25), 11.99, False),
        (Limit("tok_per_s", "fall", 0.25), 99.0, True),
    ],
)
def test_a_figure_keeps_its_bound_or_breaks_it(limit, value, passed):
    now, then = (scored(metrics={limit.metric: each}) for each in (value, 16.0))
    found = gate(limit, now, then)
    assert (found.passed, found.value, found.baseline, found.limit) == (passed, value, 16.0, str(limit))


@pytest.mark.parametrize("value", [None, float("nan"), "left out"])
def test_what_is_not_known_keeps_no_limit(value):
    now = scored(metrics={} if value == "left out" else {"ppl": value}, windows=None, bits={})
    then = scored()
    for limit in (Limit("ppl", "at_most", 20), Limit("ppl", "rise", 0.1), PAIRED, BITS, FILE):
        found = gate(limit, now, then)
        assert found.passed is False, limit
        assert found.value is None
        assert found.note.endswith("which keeps no limit")
    assert gate(Limit("ppl", "at_most", 20), now, None).passed is False


def test_a_peer_that_did_not_run_is_said_and_no_regression():
    found = gate(Limit("ratio/llama_cpp", "at_least", 1.0), timed(), timed())
    assert (found.passed, found.note) == (None, "llama_cpp did not run")


def test_what_is_new_since_the_baseline_has_absolute_limits_only():
    limits = {"pydoc": [Limit("ppl", "at_most", 100), Limit("ppl", "rise", 0.1), PAIRED, BITS, FILE]}
    for known, note in [(baseline(timed()), "new since the baseline"), (None, "there is no baseline")]:
        absolute, *others = judge(limits, [scored()], known, SAME)
        assert absolute.passed is True
        assert {(each.passed, each.note) for each in others} == {(None, note)}
        assert others[1].value == pytest.approx(scored().metrics["nll_mean_nats"])


def test_a_figure_new_in_a_known_measurement_is_not_judged():
    then = scored(metrics={}, bits={}, windows=None)
    for limit in (Limit("ppl", "rise", 0.1), BITS, PAIRED):
        found = gate(limit, scored(), then)
        assert found.passed is None
        assert found.note.startswith("the baseline ")
    nobody = gate(Limit("ppl", "rise", 0.1), scored(metrics={}), then)
    assert (nobody.passed, nobody.note) == (None, "neither the baseline nor this run has it")


def test_what_only_the_baseline_has_is_told():
    limits = {"ladder": [Limit("kld_mean", "at_most", 0.05), Limit("kld_mean", "rise", 0.1)]}
    known = baseline(compared("q4_k_m"), compared("q2_k"))
    gates = judge(limits, [compared("q4_k_m")], known, SAME)
    assert [(each.variant, each.passed) for each in gates] == [
        ("q4_k_m", True), ("q4_k_m", True), ("q2_k", None), ("q2_k", None),
    ]  # fmt: skip
    assert gates[2].note == "only the baseline has it: it was not measured today"
    assert gates[2].baseline == compared("q2_k").metrics["kld_mean"]


def test_a_check_or_test_without_a_measurement_breaks_its_absolute_limits():
    limits = {
        "pydoc": [Limit("ppl", "at_most", 100), BITS],
        "speed": [Limit("fma_share/tg64", "at_least", 0.1)],
    }
    gates = judge(limits, [timed("ppl512")], baseline(timed("ppl512")), SAME)
    assert [(each.name, each.data, each.metric, each.passed) for each in gates] == [
        ("pydoc", "", "ppl", False), ("pydoc", "", "nll_sha256", None), ("speed", "tg64", "fma_share", False),
    ]  # fmt: skip
    gone = judge(limits, [timed("tg64")], baseline(scored(), timed("tg64")), SAME)
    assert [(each.data, each.passed) for each in gone] == [("tg64", True), ("pydoc", False), ("pydoc", None)]


def test_a_limit_of_one_test_stands_in_for_that_of_all():
    limits = {"speed": [SHARE, Limit("fma_share/tg64", "fall", 0.5)]}
    then, now = ([timed(test, speed) for test in ("ppl512", "tg64")] for speed in (1000, 800))
    gates = judge(limits, now, baseline(*then), SAME)
    assert [(each.data, each.metric, each.passed) for each in gates] == [
        ("ppl512", "fma_share", False), ("tg64", "fma_share", True),
    ]  # fmt: skip


def test_speeds_are_medians_of_rounds():
    then = timed(samples={"fma_share": [0.8, 0.79, 0.81, 0.2, 0.8]})
    now = timed(samples={"fma_share": [0.1, 0.69, 0.68, 0.7, 0.1]}, metrics={})
    found = gate(SHARE, now, then)
    assert (found.value, found.baseline, found.passed) == (0.68, 0.8, True)


# what the issue plants


def test_a_gemm_30_percent_slower_is_caught_and_10_percent_are_not():
    assert gate(SHARE, timed(speed=700), timed()).passed is False
    assert gate(SHARE, timed(speed=900), timed()).passed is True


def test_a_slower_machine_is_no_regression_of_a_share():
    found = gate(SHARE, timed(speed=500, ceiling=0.5), timed())
    assert found.passed is True


def test_one_bit_off_breaks_the_file_and_says_why_scores_are_not_judged():
    then = scored()
    now = one_bit_off(then)
    assert gate(FILE, now, then).passed is False
    found = gate(BITS, now, then)
    assert found.passed is None
    assert found.note.startswith("bits are of one subject, and this is another: model_sha256 ")
    assert gate(PAIRED, now, then).passed is True


def test_numerics_not_raised_is_caught_and_named():
    then = scored()
    now = scored(nll_of(then) + 1e-9)
    found = gate(BITS, now, then, OTHER_ENGINE)
    assert found.passed is False
    assert found.note == "bits of the same subject changed although engine.NUMERICS was not raised"
    same_sources = gate(BITS, now, then, SAME)
    assert same_sources.passed is False
    assert "the engine's sources are the same" in same_sources.note
    assert gate(BITS, scored(), then, OTHER_ENGINE).passed is True


def test_numerics_raised_is_another_subject():
    now = scored(np.full(8, 690.0), subject=dict(scored().subject) | {"numerics": 2})
    found = gate(BITS, now, scored(), OTHER_ENGINE)
    assert (found.passed, found.note) == (
        None, "bits are of one subject, and this is another: numerics 1, now 2",
    )  # fmt: skip


def test_a_worse_variant_is_caught():
    then = compared()
    now = compared(nll=nll_of(then) + 5.0, kld=2 * kld_of(then))
    now = of_another_model(now)
    assert gate(Limit("kld_mean", "rise", 0.1), now, then).passed is False
    found = gate(PAIRED, now, then)
    assert found.passed is False
    assert found.note == "+0.01961 nats a token, 99 % interval 0.01961 to 0.01961 over 12 windows"
    assert gate(Limit("kld_mean", "effect", 0.005, 0.99), now, then).passed is False


def test_too_few_windows_pass_and_say_how_many_it_takes():
    then = scored()
    noise = np.random.default_rng(4).normal(0, 4, 8)
    found = gate(PAIRED, of_another_model(scored(nll_of(then) + noise)), then)
    assert found.passed is True
    head, _, tail = found.note.partition("; too few to tell a rise by 0.005, which takes about ")
    assert head.endswith(" over 8 windows")
    assert tail.endswith(" windows")
    assert int(tail.split()[0]) > 8
    one = gate(PAIRED, scored([701.0]), scored([700.0]))
    assert one.passed is True
    assert one.note.endswith("which takes more windows")


def test_a_rise_too_small_to_matter_passes_and_is_said():
    then = scored()
    found = gate(PAIRED, scored(nll_of(then) + 0.1 + np.linspace(0, 0.01, 8)), then)
    assert found.passed is True
    assert found.note.endswith("it rose, by less than the 0.005 that matters")


def test_equal_windows_need_no_words():
    found = gate(PAIRED, scored(), scored())
    assert (found.passed, found.note) == (True, "")
    assert found.value == found.baseline == pytest.approx(scored().metrics["nll_mean_nats"])


def refusal(now, then):
    with pytest.raises(SettingsError) as caught:
        require_same_measures([now], baseline(then))
    assert caught.value.kind == "OtherMeasure"
    assert caught.value.exit_code == 2
    assert "action=promote" in caught.value.hint
    text = str(caught.value)
    assert text.startswith("another measure than that of the baseline smoke: pydoc: ")
    return text.removeprefix("another measure than that of the baseline smoke: pydoc: ")


@pytest.mark.parametrize("before_work", [False, True])
def test_another_tokenizer_is_refused(before_work):
    now = with_measure(scored(), {"tokens_sha256": sha("others")})
    found = refusal((now.id, now.measure) if before_work else now, scored())
    before, after = (f"{sha(text)[:12]}..." for text in ("tokens", "others"))
    assert found == f"tokens_sha256 {before} in the baseline, {after} now: another tokenizer"


def test_a_changed_data_file_is_refused_and_its_tokens_are_no_other_tokenizer():
    now = with_measure(scored(), {"data_sha256": sha("other"), "tokens_sha256": sha("others")})
    found = refusal(now, scored())
    assert found.startswith(
        f"data_sha256 {sha('text')[:12]}... in the baseline, {sha('other')[:12]}... now: "
    )
    assert "now: the text is another one; pydoc: tokens_sha256 " in found
    assert found.endswith("now: as its text is")


def test_a_missing_window_is_refused():
    then = scored()
    w = then.windows
    kept = np.arange(8) != 5
    fewer = replace(
        w,
        **{
            name: getattr(w, name)[kept]
            for name in ("window", "document", "first_token", "n_scored", "nll_sum")
        },
    )
    found = refusal(replace(then, windows=fewer), then)
    assert found == "n_windows 8 in the baseline, 7 now: window 5 is missing"
    found = refusal(then, replace(then, windows=fewer))
    assert found == "n_windows 7 in the baseline, 8 now: window 5 is new"
    asked = with_measure(then, {"protocol_limit": 7})
    assert refusal((asked.id, asked.measure), then) == (
        "protocol_limit 8 in the baseline, 7 now: another part of the text"
    )


def test_windows_that_lie_elsewhere_are_refused():
    then = scored()
    counts = then.windows.n_scored.copy()
    counts[2] = 254
    now = replace(then, windows=replace(then.windows, n_scored=counts))
    assert refusal(now, then) == "n_scored of window 2 255 in the baseline, 254 now"


def test_a_field_that_one_of_them_lacks_is_another_measure():
    now = with_measure(scored(), {"data_errors": "replace"})
    assert refusal(now, scored()) == "data_errors none in the baseline, replace now"


def test_the_same_measure_of_another_subject_is_compared():
    require_same_measures([of_another_model(scored()), compared("new")], baseline(scored()))
    assert differing({"a": 1, "b": 2}, {"b": 3, "a": 1}) == {"b": (2, 3)}
