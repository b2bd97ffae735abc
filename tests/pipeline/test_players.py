"""Laws of players: the work is the same for every engine, processes end, failures name engine and reason."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from make_gguf import tiny_llama, write_gguf

import engine
from pipeline.bench import players
from pipeline.bench.calls import KINDS, Call, Vocabulary, Workload
from pipeline.bench.own import Own
from pipeline.bench.players import Player, PlayerError, check_peers, options_of
from pipeline.errors import SettingsError
from pipeline.protocols.windows import Windows

VOCABULARY = Vocabulary(n_vocab=300, bos_id=1)
FAKE = Path(__file__).with_name("fake_player.py")
ROOT = Path(__file__).parents[2]
WORKLOADS = {
    "perplexity": Workload("perplexity", 12, 0, 5),
    "prompt": Workload("prompt", 9, 0, 1),
    "generate": Workload("generate", 0, 4, 1),
    "batched": Workload("batched", 6, 3, 4),
}


def calls_of(workload: Workload, batch: int) -> list[Call]:
    return [call for group in workload.groups(VOCABULARY, batch) for call in group.calls]


# --- the work


def test_every_kind_has_its_example() -> None:
    assert tuple(WORKLOADS) == KINDS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 5, 24, 4096])
def test_a_batch_size_changes_no_token_and_no_output(kind: str, batch: int) -> None:
    def flat(size: int) -> dict[tuple[int, int, int], tuple[int, int, bool, bool]]:
        found = {}
        for rank, group in enumerate(WORKLOADS[kind].groups(VOCABULARY, size)):
            for call in group.calls:
                assert 1 <= call.tokens.size <= size
                columns = (call.tokens, call.positions, call.slots, call.targets, call.outputs)
                for token, position, slot, target, output in zip(*columns, strict=True):
                    assert slot < group.n_slots
                    assert position < group.capacity
                    window = seen[rank] + slot if kind == "perplexity" else slot
                    found[window, position] = (token, target, bool(output), call.timed)
            seen.append(seen[rank] + group.n_slots)
        return found

    seen = [0]
    given = flat(batch)
    seen = [0]
    assert given == flat(10_000)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_counted_are_those_timed(kind: str) -> None:
    workload = WORKLOADS[kind]
    timed = sum(call.tokens.size for call in calls_of(workload, 7) if call.timed)
    assert timed == workload.n_tokens
    n_outputs = {"perplexity": 5 * 5, "prompt": 1, "generate": 4, "batched": 12}
    assert sum(int(call.outputs.sum()) for call in calls_of(workload, 7)) == n_outputs[kind]


@pytest.mark.parametrize("n", [3, 8, 13])
def test_a_window_wants_what_the_protocol_scores(n: int) -> None:
    (call,) = calls_of(Workload("perplexity", n, 0, 1), 4096)
    stream = call.tokens.copy()
    window = Windows(n, None, VOCABULARY.bos_id).window(stream, 0)
    np.testing.assert_array_equal(call.tokens, window.tokens)
    np.testing.assert_array_equal(call.targets, window.targets)
    np.testing.assert_array_equal(call.outputs, window.targets >= 0)


def test_windows_are_decoded_together_as_a_batch_takes_them_whole() -> None:
    workload = WORKLOADS["perplexity"]
    assert [g.n_slots for g in workload.groups(VOCABULARY, 35)] == [2, 2, 1]
    assert [[c.tokens.size for c in g.calls] for g in workload.groups(VOCABULARY, 8)] == [[8, 4]] * 5


def test_a_model_without_bos_begins_with_any_token() -> None:
    drawn = Vocabulary(300, None).draw(64, 2)
    assert len(set(drawn[:, 0].tolist())) > 32
    assert (VOCABULARY.draw(64, 2)[:, 0] == 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prefill", 1, 1, 1), "kind=prefill; expected one of perplexity, prompt, generate, batched"),
        (("perplexity", 2, 0, 1), "n_prompt=2 is too small for kind=perplexity; expected 3 or more"),
        (("prompt", 0, 0, 1), "n_prompt=0 is too small"),
        (("generate", 0, 0, 1), "n_generate=0 is too small"),
        (("batched", 0, 4, 0), "n_seqs=0 is too small"),
        (("generate", 0, 4, 2), "n_seqs=2 with kind=generate; expected 1, or kind=batched"),
    ],
)
def test_work_that_cannot_be_is_refused(arguments: tuple[str, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Workload(*arguments)


# --- a player and its process


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that llama.cpp runs too."""
    return tiny_llama(tmp_path_factory.mktemp("players") / "tiny.gguf", type_name="F32")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Players whose process is tests/pipeline/fake_player.py."""
    monkeypatch.setattr(players, "_CHILD", (sys.executable, str(FAKE)))
    monkeypatch.setattr(players, "check_peers", lambda names: None)


def play(path: Path, behaviour: str = "good", engine: str = "llama_cpp", **more: object) -> Player:
    given = {"threads": 3, "cores": None, "max_tokens": 100, "n_seqs": 2} | more
    return Player(engine, str(path), options={"kv": behaviour}, **given)


def test_a_process_has_its_cores_and_threads_and_the_models_vocabulary(tiny: Path, fake: None) -> None:
    core = max(os.sched_getaffinity(0))
    with play(tiny, cores=[core]) as player, play(tiny, engine="pagemill") as ours:
        assert player.info["cores"] == [core]
        assert player.info["omp"] == "3"
        assert player.info["threads"] == 3
        assert player.info["n_vocab"] == engine.open(tiny).tensors["token_embd.weight"].shape[0]
        assert ours.info["omp"] == "1"
        assert ours.info["cores"] == sorted(os.sched_getaffinity(0))


def test_a_measurement_counts_and_divides(tiny: Path, fake: None) -> None:
    with play(tiny) as player:
        done = player.measure("prompt", n_prompt=50, n_generate=0, n_seqs=2)
    assert (done.n_tokens, done.seconds, done.tok_per_s) == (100, 100.0, 1.0)


def test_an_interrupt_is_left_to_the_parent(tiny: Path, fake: None) -> None:
    with play(tiny) as player:
        os.kill(player.info["pid"], signal.SIGINT)
        assert player.measure("prompt", n_prompt=5, n_generate=0, n_seqs=1).n_tokens == 5


def test_a_closed_player_leaves_no_process_and_may_be_closed_again(tiny: Path, fake: None) -> None:
    player = play(tiny)
    player.close()
    player.close()
    assert not Path("/proc", str(player.info["pid"])).exists()


def test_a_player_ends_with_its_parent_amid_its_work(tiny: Path) -> None:
    code = f"""
import sys
from pipeline.bench import players
players._CHILD = (sys.executable, {str(FAKE)!r})
players.check_peers = lambda names: None
player = players.Player("llama_cpp", {str(tiny)!r}, threads=1, cores=None, options={{"kv": "sleeps"}},
                        max_tokens=9, n_seqs=1)
print(player.info["pid"], flush=True)
player.measure("prompt", n_prompt=4, n_generate=0, n_seqs=1)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    process = Path("/proc", parent.stdout.readline().strip())
    assert process.exists()
    time.sleep(0.1)  # until it is asked to measure
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while process.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not process.exists()


def test_a_crash_says_signal_work_and_last_words(tiny: Path, fake: None) -> None:
    with play(tiny, "crashes") as player, pytest.raises(PlayerError) as caught:
        player.measure("prompt", n_prompt=50, n_generate=0, n_seqs=1)
    assert str(caught.value) == (
        "llama_cpp was ended by SIGSEGV in prompt of 1 x 50 tokens; "
        "it last wrote: out of luck | fake: one | fake: GGML_ASSERT(n > 0) failed"
    )
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("exits", "llama_cpp ended with exit code 7 in prompt of 1 x 5 tokens"),
        ("raises", "llama_cpp failed in prompt of 1 x 5 tokens: 4 GB wanted"),
    ],
)
def test_a_failure_in_the_work_is_told(tiny: Path, fake: None, behaviour: str, message: str) -> None:
    with play(tiny, behaviour) as player, pytest.raises(PlayerError) as caught:
        player.measure("prompt", n_prompt=5, n_generate=0, n_seqs=1)
    assert str(caught.value) == message


def test_a_dead_player_says_so_again(tiny: Path, fake: None) -> None:
    with play(tiny, "exits") as player:
        for _ in range(2):
            with pytest.raises(PlayerError, match="ended with exit code 7"):
                player.measure("prompt", n_prompt=5, n_generate=0, n_seqs=1)


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("illegal", "llama_cpp was ended by SIGILL while it opened"),
        ("refuses", r"opened no model; it last wrote: fake: first \| fake: no such architecture"),
    ],
)
def test_a_failure_to_open_is_told(tiny: Path, fake: None, behaviour: str, message: str) -> None:
    with pytest.raises(PlayerError, match=message):
        play(tiny, behaviour)


def test_work_beyond_what_a_player_was_opened_for_is_refused(tiny: Path, fake: None) -> None:
    with play(tiny) as player:
        with pytest.raises(ValueError, match="2 sequences of 51 tokens; the player was opened for 2"):
            player.measure("batched", n_prompt=50, n_generate=1, n_seqs=2)
        with pytest.raises(ValueError, match="3 sequences of 1 tokens"):
            player.measure("prompt", n_prompt=1, n_generate=0, n_seqs=3)


# --- refusals before a process


def test_an_unknown_peer_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        SettingsError, match=r"peer=lama_cpp is not known; did you mean llama_cpp\?"
    ) as caught:
        check_peers(["lama_cpp"])
    assert caught.value.exit_code == 2
    with pytest.raises(SettingsError, match="peer=pagemill is not known"):
        check_peers(["pagemill"])  # ourselves as we are: nothing to compare


def test_a_missing_peer_is_refused_with_how_to_install_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for refused in (lambda: check_peers(["ik_llama_cpp"]), lambda: play(tiny, engine="ik_llama_cpp")):
        with pytest.raises(SettingsError, match="there is no Python package ik_llama_cpp here") as caught:
            refused()
        assert "pip install 'pagemill[bench]'" in caught.value.hint


def test_an_unknown_option_is_refused_with_the_nearest(tiny: Path, fake: None) -> None:
    for name, options in (("llama_cpp", {"ubach": 1}), ("pagemill", {"batch_token": 1})):
        with pytest.raises(SettingsError, match=rf"{name} has no option {next(iter(options))}; did you mean"):
            Player(name, str(tiny), threads=1, cores=None, options=options, max_tokens=1, n_seqs=1)


def test_files_that_are_no_language_models_are_refused(tmp_path: Path, fake: None) -> None:
    path = write_gguf(tmp_path / "w.gguf", {"general.architecture": "x"}, {"w": ("F32", (2, 32), bytes(256))})
    with pytest.raises(PlayerError, match=r"has no tensor token_embd\.weight; expected a language model"):
        play(path)
    path.write_bytes(b"text")
    with pytest.raises(engine.GGUFFormatError):
        play(path)
    with pytest.raises(FileNotFoundError):
        play(tmp_path / "none.gguf")


@pytest.mark.parametrize("name", players.ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_settings_to_try_are_few_and_known(name: str, kind: str) -> None:
    tried = options_of(name, kind)
    assert 1 <= len(tried) <= 3
    for options in tried:
        players._check_options(name, options)


# --- engines


def test_our_engine_plays_every_kind(tiny: Path) -> None:
    with Player(
        "pagemill", str(tiny), threads=2, cores=None, options={"batch_tokens": 24}, max_tokens=60, n_seqs=5
    ) as player:
        for kind, work in WORKLOADS.items():
            done = player.measure(
                kind, n_prompt=work.n_prompt, n_generate=work.n_generate, n_seqs=work.n_seqs
            )
            assert done.n_tokens == work.n_tokens
            assert done.seconds > 0
        info, memory = player.info, player.memory()
    assert (info["engine"], info["threads"], info["batch"], info["kv"]) == ("pagemill", 2, 24, "f32")
    assert info["numerics"] == engine.NUMERICS
    assert info["features"]
    assert info["load_s"] <= info["ready_s"]
    assert sum(info["stages"].values()) == pytest.approx(info["ready_s"] + info["compile_s"])
    assert memory["mapped_bytes"] >= tiny.stat().st_size
    assert memory["pss_bytes"] > 0


def test_our_engine_takes_a_fleeting_cache_for_windows_that_fit_a_batch(tiny: Path) -> None:
    own = Own("pagemill", str(tiny), 1, {"batch_tokens": 24, "kv": "f16"}, VOCABULARY)
    for work, fleeting in (
        (WORKLOADS["perplexity"], True),
        (Workload("perplexity", 30, 0, 1), False),
        (WORKLOADS["prompt"], False),
        (WORKLOADS["batched"], False),
    ):
        own.measure(work)
        assert own._cache.fleeting is fleeting
        assert own._cache.keys.dtype == np.uint16


PEER = """
import ctypes, json, sys
import numpy as np
from pipeline.bench.calls import Vocabulary, Workload
from pipeline.bench.libllama import LibLlama, _function
engine, path, n_vocab, option, works = sys.argv[1:]
player = LibLlama(engine, path, 1, json.loads(option), Vocabulary(int(n_vocab), 1))
row = _function(player._module._lib, "llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), ctypes.c_void_p,
                ctypes.c_int32)
found = []
for work in json.loads(works):
    seconds = player.measure(Workload(*work))
    assert seconds > 0
    found.append([float(x) for x in row(player._context, -1)[: int(n_vocab)]])
print(json.dumps({"info": player.info, "rows": found}))
"""


@pytest.mark.parametrize("option", [{}, {"batch": 5, "flash_attention": False}], ids=["whole", "pieces"])
@pytest.mark.parametrize("name", players.PEERS)
def test_a_peer_decodes_the_same_tokens_as_we(tiny: Path, name: str, option: dict[str, object]) -> None:
    """The last row of logits of each kind of work: batches are laid out as the library reads them.

    Peers keep keys and values as halves; another token or position would move a logit by a nat.
    """
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install 'pagemill[bench]'")
    works = [Workload("prompt", 9, 0, 1), Workload("generate", 0, 4, 1), Workload("batched", 6, 3, 4)]
    sizes = [[w.kind, w.n_prompt, w.n_generate, w.n_seqs] for w in works]
    with engine.open(tiny) as file:
        model = engine.load_model(file)
        vocabulary = Vocabulary(model.n_vocab, 1)
        expected = []
        for work in works:
            (group,) = work.groups(vocabulary, 4096)
            cache = model.new_cache(group.n_slots, group.capacity)
            for call in group.calls:
                batch = engine.Batch(call.tokens, call.positions, call.slots, outputs=call.outputs)
                rows = model.logits(batch, cache)
            expected.append(rows[-1])
    arguments = [name, str(tiny), str(vocabulary.n_vocab), json.dumps(option), json.dumps(sizes)]
    done = subprocess.run(
        [sys.executable, "-c", PEER, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert "AVX2 = 1" in told["info"]["features"]
    for row, reference in zip(told["rows"], expected, strict=True):
        np.testing.assert_allclose(row, reference, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", players.PEERS)
def test_a_peer_plays_a_perplexity_in_its_own_process(tiny: Path, name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install 'pagemill[bench]'")
    with Player(name, str(tiny), threads=2, cores=None, options={}, max_tokens=60, n_seqs=5) as player:
        done = player.measure("perplexity", n_prompt=12, n_generate=0, n_seqs=5)
        assert done.n_tokens == 60
        assert player.info["kv"] == "f16"
        assert player.memory()["anonymous_bytes"] > 0


@pytest.mark.parametrize("name", players.PEERS)
def test_a_model_that_a_peer_does_not_open_is_told_in_its_words(tmp_path: Path, name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install 'pagemill[bench]'")
    path = write_gguf(
        tmp_path / "w.gguf",
        {"general.architecture": "x"},
        {"token_embd.weight": ("F32", (2, 32), bytes(256))},
    )
    with pytest.raises(
        PlayerError, match=r"llama_model_load_from_file opened no model; it last wrote: .*arch"
    ):
        Player(name, str(path), threads=1, cores=None, options={}, max_tokens=1, n_seqs=1)
