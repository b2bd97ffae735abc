"""Protocol `windows`: llama.cpp's, step by step, against a transcription of its loop."""

import numpy as np
import pytest

from pipeline.errors import DataError, SettingsError
from pipeline.protocols.windows import Windows
from pipeline.settings import ProtocolSettings
from pipeline.windows import open_protocol


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


def test_unknown_protocols_are_refused():
    assert open_protocol(ProtocolSettings(window=7), 3) == Windows(7, None, 3)
    with pytest.raises(SettingsError, match="carry"):
        open_protocol(ProtocolSettings("carry"), None)


def test_windows_of_the_oracle_are_ours(shared_data):
    oracle = np.load(shared_data / "oracle/smollm2-nll.npz")
    tokens, scores = oracle["tokens"].reshape(-1), oracle["nll_float64"]
    window = Windows(512, None, None).window(tokens, 3)
    assert window.tokens.tolist() == tokens[3 * 512 : 4 * 512].tolist()
    assert np.count_nonzero(window.targets >= 0) == scores.shape[1] == 255
