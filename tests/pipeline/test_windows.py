"""Protocol `windows`: llama.cpp's, step by step, against a transcription of its loop."""

import itertools

import numpy as np
import pytest
from fake_engine import FakeTokenizer

from pipeline.datasets import Text
from pipeline.errors import DataError, SettingsError
from pipeline.protocols.windows import Windows
from pipeline.provenance import run_key
from pipeline.settings import ProtocolSettings
from pipeline.tokens import token_stream
from pipeline.windows import Window, batches, open_protocol


@pytest.fixture
def stream_of(tmp_path):
    """The token stream of documents, by bytes, BOS first; one is a joined text."""

    def made(*documents):
        text = (
            Text(documents[0], "0" * 64, "t")
            if len(documents) == 1
            else Text("", "0" * 64, "t", (0,), documents)
        )
        return token_stream(text, FakeTokenizer(None), tmp_path)

    return made


def transcription(tokens, n_ctx, bos):
    """protocol.md 2.2 as it stands there: (input, [(position, target)]) of each chunk."""
    first = n_ctx // 2
    for c in range(len(tokens) // n_ctx):
        x = list(tokens[c * n_ctx : (c + 1) * n_ctx])
        if bos is not None:
            x[0] = bos
        yield x, [(p, tokens[c * n_ctx + p + 1]) for p in range(first, n_ctx - 1)]


@pytest.mark.parametrize("size", [3, 4, 5, 8, 17])
@pytest.mark.parametrize("bos", [None, 99])
def test_windows_equal_llama_cpp_step_by_step(size, bos):
    tokens = np.arange(100, 100 + 5 * size + size // 2, dtype=np.int32)
    protocol = Windows(size, None, bos)
    expected = list(transcription(tokens.tolist(), size, bos))
    assert protocol.n_windows(tokens.size) == len(expected) == 5
    for index, (read, scored) in enumerate(expected):
        window = protocol.window(tokens, index)
        assert window.tokens.tolist() == read
        assert window.first_token == index * size
        assert [(p, t) for p, t in enumerate(window.targets.tolist()) if t >= 0] == scored
        assert tokens[window.scored].tolist() == [target for _, target in scored]
    assert tokens[0] == 100, "the stream is not written to"


def test_ten_token_example_of_the_docstring():
    protocol = Windows(5, None, bos_id=0)
    first, second = (protocol.window(np.arange(1, 11, dtype=np.int32), index) for index in range(2))
    assert first.tokens.tolist() == [0, 2, 3, 4, 5]
    assert first.targets.tolist() == [-1, -1, 4, 5, -1]
    assert second.tokens.tolist() == [0, 7, 8, 9, 10]
    assert second.targets.tolist() == [-1, -1, 9, 10, -1]


def test_each_token_is_predicted_at_most_once_and_half_of_them_are():
    tokens, protocol = np.arange(5120, dtype=np.int32), Windows(512, None, None)
    places = [place for i in range(10) for place in range(5120)[protocol.window(tokens, i).scored]]
    assert len(places) == len(set(places)) == 2550


def test_limit_keeps_the_first_windows_and_one_that_cuts_nothing_is_none():
    assert Windows(4, 2, None).n_windows(100) == 2
    assert Windows(4, 99, None).n_windows(100) == 25
    assert Windows(4, 25, None).measure(100) == Windows(4, None, None).measure(100)
    assert Windows(4, 24, None).measure(100) != Windows(4, None, None).measure(100)


def test_shorter_than_two_windows_is_refused_with_both_counts():
    assert Windows(512, None, None).n_windows(1024) == 2
    with pytest.raises(DataError, match=r"1,023 tokens, expected at least 1,024") as caught:
        Windows(512, None, None).n_windows(1023)
    assert "protocol.window=511" in caught.value.hint
    with pytest.raises(DataError):
        Windows(512, 1, None).n_windows(1023)


def test_unknown_protocols_are_refused(stream_of):
    assert open_protocol(ProtocolSettings(window=7), 3, stream_of("ab")) == Windows(7, None, 3)
    with pytest.raises(SettingsError, match="kerry"):
        open_protocol(ProtocolSettings("kerry"), None, stream_of("ab"))


def test_measure_and_key_of_a_text_are_what_they_were():
    """Pinned: a setting added since may not enter the key of a run that does not use it."""
    measure = Text("", "d" * 64, "t").measure | {"tokens_sha256": "e" * 64}
    measure |= Windows(512, 6, 1).measure(303_415)
    assert measure == {
        "data_sha256": "d" * 64,
        "tokens_sha256": "e" * 64,
        "protocol": "windows",
        "protocol_version": 1,
        "protocol_window": 512,
        "protocol_limit": 6,
        "protocol_bos_id": 1,
    }
    subject = {"model_sha256": "c", "adapters": "", "kv_type": "f32", "activation_type": "f32", "numerics": 1}
    assert run_key(measure, subject) == "1778f3c9e2263a2f"


@pytest.mark.parametrize("sizes", [[5, 5, 5, 5], [1, 9, 2, 3, 30, 1, 1, 1, 1, 1], [40], [1] * 20, []])
def test_batches_are_whole_windows_that_fit(sizes):
    windows = [
        Window(i, 0, np.zeros(size, np.int32), np.zeros(size, np.int32), slice(0, size))
        for i, size in enumerate(sizes)
    ]
    calls = list(batches(windows, 10, 4))
    assert [window for call in calls for window in call] == windows, "in order, none lost"
    for call, following in itertools.zip_longest(calls, calls[1:], fillvalue=()):
        n_tokens = sum(window.tokens.size for window in call)
        assert len(call) == 1 or (n_tokens <= 10 and len(call) <= 4)
        assert not following or len(call) == 4 or n_tokens + following[0].tokens.size > 10, "no room is left"


def test_windows_of_the_oracle_are_ours(shared_data):
    oracle = np.load(shared_data / "oracle/smollm2-nll.npz")
    tokens, scores = oracle["tokens"].reshape(-1), oracle["nll_float64"]
    window = Windows(512, None, None).window(tokens, 3)
    assert window.tokens.tolist() == tokens[3 * 512 : 4 * 512].tolist()
    assert np.count_nonzero(window.targets >= 0) == scores.shape[1] == 255
