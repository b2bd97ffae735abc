"""A node whose network goes away without a word: it is noticed, done without, and its late files do no harm.

A head and a node in network namespaces of their own, which a pair of virtual Ethernet devices joins; all
within a user namespace, so no root is needed, and nothing of this machine's network is touched. The node's
end of the pair is taken down in mid-run: no connection is closed, packets just do not arrive any more. Its
workers live on, unreachable, and publish what they were at into the folder that all share.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from make_gguf import tiny_llama

from pipeline import evaluate
from pipeline.settings import ClusterSettings
from tests.pipeline.ray_script import ROOT, script_environment
from tests.pipeline.slow_workers import prepare, settings_of

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]

TEXT = "The quick brown fox jumps over the lazy dog, and — as ever — nobody asks why. " * 12
HEAD, NODE = "10.77.0.1", "10.77.0.2"
NOTICED_S = 30.0  # as jobs/README.md sets the health check it takes seven seconds; machines are busy
HEALTH_CHECK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


def until(check: Callable[[], Any], timeout_s: float) -> Any:
    """What `check` returns as soon as that is something."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := check():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s} s")


def network_of(pid: int | str) -> str | None:
    """The kernel's name for a process's network, None when the process is gone."""
    try:
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return None


@dataclass
class Networks:
    """Two networks, each held by a process that sleeps in it; `names` as the kernel calls them."""

    holders: list[subprocess.Popen[bytes]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def within(self, which: int, *words: str) -> list[str]:
        """A command in one of them, 0 or 1."""
        enter = ["nsenter", "--preserve-credentials", "-U", "-n", "-t", str(self.holders[which].pid), "--"]
        return [*enter, *words]

    def hold(self, *command: str) -> None:
        """Open a network in which a process sleeps."""
        self.holders.append(subprocess.Popen([*command, "sleep", "600"]))
        known = [network_of(os.getpid()), *self.names]
        until(lambda: network_of(self.holders[-1].pid) not in [None, *known], 10)
        self.names.append(network_of(self.holders[-1].pid) or "")

    def ip(self, which: int, *words: str) -> None:
        subprocess.run(self.within(which, "ip", *words), check=True, capture_output=True)

    def inhabitants(self) -> list[psutil.Process]:
        """Every process in either of them."""
        return [process for process in psutil.process_iter() if network_of(process.pid) in self.names]

    def close(self) -> None:
        """End all that lives in them; the kernel then takes them away."""
        left = self.inhabitants()
        for one in left:
            with suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(left, timeout=10)
        for process in self.holders:
            process.kill()
            process.wait()


@pytest.fixture
def networks() -> Iterator[Networks]:
    """A head's and a node's, joined; the test is skipped where no namespace can be made."""
    wanted = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    if wanted:
        pytest.skip(f"{' and '.join(wanted)}: not installed (util-linux, iproute2)")
    allowed = subprocess.run(["unshare", "-rn", "true"], capture_output=True, text=True, check=False)
    if allowed.returncode:
        pytest.skip(f"no namespace of users and networks can be made here: {allowed.stderr.strip()}")
    made = Networks()
    try:
        made.hold("unshare", "-rn")
        made.hold(*made.within(0, "unshare", "-n"))
        veth = ("link", "add", "pm0", "type", "veth", "peer", "name", "pm1")
        made.ip(0, *veth, "netns", str(made.holders[1].pid))
        for which, address in enumerate((HEAD, NODE)):
            made.ip(which, "address", "add", f"{address}/24", "dev", f"pm{which}")
            made.ip(which, "link", "set", f"pm{which}", "up")
            made.ip(which, "link", "set", "lo", "up")
        yield made
    finally:
        made.close()


@pytest.fixture
def cluster(networks: Networks) -> Iterator[dict[str, str]]:
    """A head with one CPU and a node with two; the environment that they and drivers have."""
    folder = Path(tempfile.mkdtemp(prefix="pmc", dir="/tmp"))
    environment = {**script_environment(), **HEALTH_CHECK, "PAGEMILL_LOG": "json"}
    del environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]  # that would keep it on loopback
    common = ["ray", "start", "--block", f"--object-store-memory={80 << 20}", "--disable-usage-stats"]
    starting = []
    ways = [
        ["--head", "--port=6379", "--include-dashboard=false", "--num-cpus=1"],
        [f"--address={HEAD}:6379", "--num-cpus=2"],
    ]
    try:
        for which, (address, words) in enumerate(zip((HEAD, NODE), ways, strict=True)):
            command = networks.within(which, *common, *words, f"--node-ip-address={address}")
            command.append(f"--temp-dir={folder}/{which}")
            with (folder / f"{which}.log").open("wb") as log:
                starting.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT))
            said = folder / f"{which}.log"
            until(lambda said=said: "Ray runtime started" in said.read_text(), 90)
        yield environment
    finally:
        networks.close()
        for process in starting:
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def path_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray` of this interpreter comes first."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def told(folder: Path, kind: str) -> list[list[str]]:
    """Parts of the names of the files that workers left in a folder of the cache."""
    place = folder / "cache" / kind
    return [path.name.split(".") for path in place.iterdir()] if place.exists() else []


def events(log: Path) -> list[dict[str, Any]]:
    """What a driver told of, with `when`, seconds since 1970."""
    found = []
    for line in log.read_text().splitlines():
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and "event" in entry:
                entry["when"] = datetime.datetime.fromisoformat(entry["time"]).timestamp()
                found.append(entry)
    return found


@pytest.mark.usefixtures("path_of_ray")
def test_a_node_that_is_cut_off_is_done_without_and_its_late_files_do_no_harm(
    tmp_path: Path, networks: Networks, cluster: dict[str, str]
) -> None:
    """One of its two workers publishes at once after the cut, the other one when its shard is long done."""
    tiny_llama(tmp_path / "tiny.gguf", type_name="Q4_1")
    (tmp_path / "t.txt").write_text(TEXT)
    prepare(tmp_path, seconds=0)
    whole = evaluate(settings_of(tmp_path, "whole", ClusterSettings("inline"))).summary
    for mark in (tmp_path / "cache" / "marks").iterdir():
        mark.unlink()  # this process's own
    prepare(tmp_path, seconds=1.0)
    log = tmp_path / "driver.log"
    command = [sys.executable, "-m", "tests.pipeline.cut_off_workers", str(tmp_path), "results"]
    with log.open("wb") as err:
        driver = subprocess.Popen(
            networks.within(0, *command, f"{HEAD}:6379"),
            env=cluster,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
        )

    def in_work_there() -> dict[int, int]:
        """First windows by process of the node, while both of its workers are at one."""
        published = {(first, pid) for first, pid, _ in told(tmp_path, "published")}
        found = {}
        for first, pid in told(tmp_path, "marks"):
            if (first, pid) not in published and network_of(pid) == networks.names[1]:
                found[int(pid)] = int(first)
        return found if len(found) == 2 and len(told(tmp_path, "published")) >= 3 else {}

    at = until(in_work_there, 90)
    networks.ip(1, "link", "set", "pm1", "down")
    cut = time.time()
    early, late = at
    os.kill(late, signal.SIGSTOP)
    out, _ = driver.communicate(timeout=120)
    ended = time.time()
    assert driver.returncode == 0, log.read_text()

    def published(pid: int) -> list[int]:
        """By that process of the shard that it had when it was cut off: whether it was the first."""
        mine = [str(at[pid]), str(pid)]
        return [int(first) for *who, first in told(tmp_path, "published") if who == mine]

    assert published(early) == [1], "cut off, it was the first to publish"
    assert published(late) == []
    file = next((tmp_path / "results").rglob(f"shard-{at[late]:08d}.parquet"))
    before = file.read_bytes()
    os.kill(late, signal.SIGCONT)
    assert until(lambda: published(late), 30) == [0], "the file that was there stays"
    assert file.read_bytes() == before

    summary = json.loads(out.splitlines()[-1])
    assert summary["ok"]
    assert (summary["nll_sha256"], summary["run_key"]) == (whole["nll_sha256"], whole["run_key"])
    rows = [row for path in file.parent.glob("shard-*.parquet") for row in pq.read_table(path).to_pylist()]
    assert sorted(row["window"] for row in rows) == list(range(whole["n_windows"]))
    workers = {row["window"]: int(row["worker"].rpartition(":")[2]) for row in rows}
    assert workers[at[early]] == early
    assert workers[at[late]] != late

    said = events(log)
    lost = [event["when"] - cut for event in said if event["event"] == "worker_lost"]
    given_back = {event["shard"]: event["when"] - cut for event in said if event["event"] == "shard_retried"}
    assert len(lost) == 2, "both workers, once; whether the pool or Ray itself was first to see it"
    assert max(lost) < NOTICED_S
    assert given_back.keys() == set(at.values()), "what the node had in its hands, and no more"
    done_again = {
        event["shard"]: event["when"] - cut for event in said if event["event"] == "shard_done"
    }[at[late]]  # fmt: skip
    print(  # noqa: T201
        f"\na node cut off: noticed after {min(lost):.1f} s, its shards given back after "
        f"{max(given_back.values()):.1f} s and done by others after {done_again:.1f} s; the run ended "
        f"{ended - cut:.1f} s after the cut",
        end="",
    )
