"""The script of the nightly gate: names of tries, the lock, exit codes, submissions, refusals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import provenance
from tests.jobs.fake_gate import COMMIT, NIGHTLY, Gate, name_of
from tests.jobs.test_submit import Head
from tests.jobs.test_submit import head as ray_head

head = ray_head  # a fixture: this module's own


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def test_a_try_is_named_told_what_to_do_and_leaves_its_last_line(gate: Gate) -> None:
    (gate.folder / "j.xml").write_text("<testsuites/>")
    (gate.folder / "s.md").write_text("all green\n")
    steps = gate.folder / "steps.md"
    code, out, error = gate.run(
        *("smoke", "baseline=a b", "tracking=none"),
        PAGEMILL_CACHE="/c",
        PAGEMILL_TRACKING_URI="http://127.0.0.1:5000",
        GITHUB_STEP_SUMMARY=str(steps),
    )
    assert code == 0, error
    results = gate.folder / "results"
    assert gate.lines("calls") == [
        f"-m jobs.regression suite=smoke action=check paths.results={results} paths.cache=/c "
        "tracking=server tracking.uri=http://127.0.0.1:5000 baseline=a b tracking=none"
    ]
    assert json.loads(out)["job"] == "regression", "one JSON line and nothing else"
    kept = results / "nightly"
    assert (kept / f"{name_of(1, 'smoke')}.json").read_text() == out
    assert "a line of the log" in (kept / f"{name_of(1, 'smoke')}.log").read_text()
    assert f"{name_of(1, 'smoke')} ended with exit code 0" in error
    assert (kept / "latest.xml").read_text() == "<testsuites/>"
    assert steps.read_text() == (kept / "latest.md").read_text() == "all green\n"


@pytest.mark.parametrize("code", [2, 4, 130])
def test_exit_codes_are_passed_on(gate: Gate, code: int) -> None:
    gate.say(code)
    assert gate.run()[0] == code


def test_a_try_without_a_verdict_is_followed_by_the_next_and_one_with_a_verdict_by_none(gate: Gate) -> None:
    gate.say(3, "none", 1)
    assert gate.run()[0] == 3
    code, out, error = gate.run()
    assert (code, json.loads(out)["exit_code"]) == (3, 3)
    assert f"{name_of(2)} ended without its last line" in error
    assert gate.run()[0] == 1
    code, out, error = gate.run()
    assert (code, json.loads(out)["exit_code"]) == (1, 1), "red stays red"
    assert f"{name_of(3)} already ran, with exit code 1" in error
    assert len(gate.lines("calls")) == 3
    gate.say(0)
    assert gate.run(PAGEMILL_GIT_SHA="fedc")[0] == 0, "another commit is another gate"


def test_the_ninth_try_is_the_last(gate: Gate) -> None:
    kept = gate.folder / "results/nightly"
    kept.mkdir(parents=True)
    for number in range(1, 10):
        (kept / f"{name_of(number)}.json").write_text('{"exit_code": 3}')
    code, _, error = gate.run()
    assert (code, gate.lines("calls")) == (2, [])
    assert "was tried 9 times" in error


def test_two_gates_do_not_overlap_and_the_lock_of_a_dead_one_is_taken_over(gate: Gate) -> None:
    (gate.folder / "hold").touch()
    first = gate.start()
    deadline = time.monotonic() + 20
    while not gate.lines("began"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    code, _, error = gate.run()
    assert code == 0, "a double firing does no harm"
    assert f"{name_of(1)}, process {first.pid} on" in error
    assert "is on its way already" in error
    code, _, error = gate.run(PAGEMILL_GIT_SHA="fedc")
    assert code == 2, "last night's is too long"
    assert f"so {name_of(1, commit='fedc')[:-2]} is not begun" in error
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    (gate.folder / "hold").unlink()
    code, _, error = gate.run()
    assert code == 0
    assert f"{name_of(1)}, process {first.pid} on" in error
    assert "died; its lock is taken over" in error
    assert f"{name_of(1)} begins" in error, "it left no verdict"
    assert (gate.folder / "results/nightly/lock").read_text() == ""


def test_a_cluster_is_submitted_to_and_its_jobs_exit_code_is_passed_on(gate: Gate) -> None:
    gate.on_cluster()
    gate.say(3, 1)
    assert gate.run(PAGEMILL_WIKITEXT="/a b.raw")[0] == 3
    assert gate.run(PAGEMILL_WIKITEXT="/a b.raw")[0] == 1
    submitted = [line for line in gate.lines("ray") if line.startswith("job submit")]
    assert submitted == [
        f"job submit --address http://127.0.0.1:8265 --submission-id {name_of(number)} --no-wait "
        "--working-dir . --runtime-env jobs/deploy/runtime_env.yaml -- "
        f"env PAGEMILL_GIT_SHA={COMMIT} PAGEMILL_WIKITEXT=/a b.raw {gate.folder}/bin/python "
        f"-m jobs.regression suite=nightly action=check paths.results={gate.folder}/results "
        "cluster=ray cluster.address=auto"
        for number in (1, 2)
    ]
    assert gate.lines("commits") == [COMMIT] * 2


def test_a_job_that_was_submitted_before_is_joined(gate: Gate) -> None:
    """As when the machine that submitted it died: there is a job of that id, and no record."""
    gate.on_cluster()
    assert gate.run()[0] == 0
    (gate.folder / f"results/nightly/{name_of(1)}.json").unlink()
    (gate.folder / "silences").write_text("a\nb\n")
    code, out, error = gate.run()
    assert (code, json.loads(out)["exit_code"]) == (0, 0)
    assert f"{name_of(1)} was submitted before; what becomes of it is passed on" in error
    assert len(gate.lines("calls")) == 1
    assert gate.lines("slept") == ["30", "30"], "until it is known how it ended"


def test_a_cluster_that_does_not_answer_is_no_verdict(gate: Gate) -> None:
    gate.on_cluster()
    (gate.folder / "silences").write_text("a\n" * 40)
    code, out, error = gate.run()
    assert (code, out) == (3, "")
    assert "run this again to join it" in error
    (gate.folder / "silences").unlink()
    assert gate.run()[0] == 0
    assert len(gate.lines("calls")) == 1
    gate.command("ray", "#!/bin/bash\necho refused to connect\nexit 1\n")
    code, _, error = gate.run(PAGEMILL_GIT_SHA="fedc")
    assert code == 2
    assert "refused to connect" in error
    assert "could not be submitted" in error


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, None])
def test_a_token_that_others_can_read_or_that_is_not_there_is_refused(gate: Gate, mode: int | None) -> None:
    gate.on_cluster()
    token = gate.folder / "token"
    if mode is None:
        token.unlink()
    else:
        token.chmod(mode)
    code, _, error = gate.run()
    assert (code, gate.lines("ray")) == (2, [])
    assert ("chmod 600 it" if mode else "no token there") in error
    assert "0000" not in error
    assert gate.run(RAY_AUTH_TOKEN="0" * 64)[0] == 0, "given itself, no file is read"


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (["../x"], {}, "suite ../x: expected letters"),
        ([], {"PAGEMILL_RESULTS": "results"}, "PAGEMILL_RESULTS=results: expected an absolute folder"),
        ([], {"PAGEMILL_RESULTS": "/proc/none"}, "PAGEMILL_RESULTS=/proc/none: cannot be written"),
        ([], {"PAGEMILL_CACHE": "cache"}, "PAGEMILL_CACHE=cache: expected an absolute folder"),
        ([], {"PAGEMILL_BIN": "bin"}, "PAGEMILL_BIN=bin: expected an absolute folder with python"),
        ([], {"PAGEMILL_GIT_SHA": "a/b"}, "PAGEMILL_GIT_SHA=a/b: expected letters and digits"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    gate: Gate, words: list[str], environment: dict[str, str], said: str
) -> None:
    code, out, error = gate.run(*words, **environment)
    assert (code, out, gate.lines("calls")) == (2, "", [])
    assert said in error


def test_the_commit_is_the_checkouts_and_travels_with_what_is_shipped(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, error = gate.run(PAGEMILL_GIT_SHA="")
    assert code == 0
    found = re.search(r"pagemill-nightly-\d{8}-(\w+)-1 begins", error)
    assert found is not None
    sha = provenance.git_sha()
    assert found[1] == (sha[:12] if sha else "unknown")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "pipeline/provenance.py"))
    assert provenance.git_sha() is None
    monkeypatch.setenv("PAGEMILL_GIT_SHA", COMMIT)
    assert provenance.git_sha() == COMMIT


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_real_cluster_is_submitted_to_and_tells_the_exit_code(head: Head, tmp_path: Path) -> None:
    """A suite that is not there: refused with 2, where `ray job submit` says 1; asked twice, tried twice."""
    environment = head.environment | {
        "PAGEMILL_BIN": str(Path(sys.executable).parent),
        "PAGEMILL_RESULTS": str(tmp_path),
        "PAGEMILL_GIT_SHA": COMMIT,
        "RAY_API_SERVER_ADDRESS": head.dashboard,
    }
    for number in (1, 2):
        done = subprocess.run(
            [str(NIGHTLY), "nosuch"], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2, done.stderr
        line = json.loads(done.stdout)
        assert (line["ok"], line["exit_code"]) == (False, 2)
        assert f"{name_of(number, 'nosuch')} ended with exit code 2" in done.stderr
    (tmp_path / f"nightly/{name_of(2, 'nosuch')}.json").unlink()
    done = subprocess.run([str(NIGHTLY), "nosuch"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{name_of(2, 'nosuch')} was submitted before" in done.stderr
