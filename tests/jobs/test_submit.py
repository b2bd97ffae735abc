"""Jobs submitted for real, as jobs/README.md says it: a head with a dashboard and a token, on loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests/data/mamba-tiny-q8_0.gguf"
README = (ROOT / "jobs/README.md").read_text()
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@dataclass(frozen=True)
class Head:
    """A head of two CPUs, its folder and what its dashboard and its exporter answer at."""

    folder: Path
    process: subprocess.Popen[str]
    dashboard: str
    exporter: str
    environment: dict[str, str]

    def started(self) -> list[psutil.Process]:
        """Its processes and theirs."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def recipe(language: str, word: str) -> str:
    """The README's fenced block with that word."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if word in block]
    return str(found)


def answers(url: str, token: str | None = None) -> int:
    """HTTP status, 0 where nothing listens."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return 0


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="pms", dir="/tmp"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PAGEMILL_PYTHON": sys.executable,
        "MODEL": str(MODEL),
        "SHARED": str(folder / "shared"),
    }
    subprocess.run(["bash", "-euc", recipe("bash", "secrets.token_hex")], env=environment, check=True)
    environment["RAY_AUTH_MODE"] = "token"
    gcs, dashboard, client, agent, exporter = free_ports(5)
    environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    command = [
        "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=2",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
        f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={exporter}",
        f"--object-store-memory={80 << 20}", f"--temp-dir={folder}/r", "--disable-usage-stats",
    ]  # fmt: skip
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{dashboard}"
    head = Head(folder, process, url, f"http://127.0.0.1:{exporter}/metrics", environment)
    deadline = time.monotonic() + 90
    while answers(f"{url}/api/gcs_healthz") != 200:
        assert process.poll() is None, (folder / "head.log").read_text()
        assert time.monotonic() < deadline, (folder / "head.log").read_text()
        time.sleep(0.5)
    yield head
    ours = head.started()
    process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(ours, timeout=20)
    for one in left:
        one.kill()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def test_the_dashboard_wants_the_token_and_all_listen_on_loopback(head: Head) -> None:
    token = (head.folder / "token").read_text().strip()
    assert answers(f"{head.dashboard}/api/jobs/") == 401
    assert answers(f"{head.dashboard}/api/jobs/", "0" * 64) == 403
    assert answers(f"{head.dashboard}/api/jobs/", token) == 200
    listening = {
        connection.laddr.ip
        for process in head.started()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    assert listening <= LOOPBACK


def test_a_submitted_command_leaves_its_table_and_its_metrics(head: Head) -> None:
    block = recipe("bash", "ray job submit")
    done = subprocess.run(
        ["bash", "-euc", block], cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"job": "perplexity"')]
    summary = json.loads(line)
    assert (summary["exit_code"], summary["n_windows"], summary["n_workers"]) == (0, 8, 2)
    folder = head.folder / "shared/results/v1/table=windows" / f"run_key={summary['run_key']}"
    shards = [pq.read_table(path, partitioning=None) for path in sorted(folder.glob("shard-*.parquet"))]
    assert [window for shard in shards for window in shard.column("window").to_pylist()] == list(range(8))
    events = re.findall(r" event=(\S+) ", done.stdout)
    assert (events.count("worker_ready"), events.count("shard_done"), events.count("run_ended")) == (2, 2, 1)
    told = f"run={summary['run_key']} shard="
    assert done.stdout.count(told) == 2
    assert (head.folder / "token").read_text().strip() not in done.stdout + done.stderr

    (package,) = (head.folder / "r").glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    assert {path.name for path in package.iterdir()} >= {"conf", "engine", "jobs", "pipeline"}
    assert not {"tests", "models", "results", ".venv", ".git"} & {path.name for path in package.iterdir()}
    assert sum(path.stat().st_size for path in package.rglob("*") if path.suffix != ".pyc") < 5 << 20


def test_the_python_client_knows_the_exit_code(head: Head, tmp_path: Path) -> None:
    """Refused settings exit with 2, where `ray job submit` says 1; the shards of the first job are reused."""
    script = tmp_path / "submit.py"
    script.write_text(recipe("python", "JobSubmissionClient"))
    for words, exit_code in (([], 0), (["protocol.limit=0"], 2)):
        done = subprocess.run(
            [sys.executable, str(script), *words],
            cwd=ROOT,
            env=head.environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == exit_code, done.stdout + done.stderr
        run_key, ppl = done.stdout.split()
        assert (run_key == "None", ppl == "None") == (exit_code == 2, exit_code == 2)


def test_prometheus_is_told_of_the_run(head: Head, tmp_path: Path) -> None:
    """The command itself as the driver, long enough for its metrics to be exported."""
    command = [
        sys.executable, "-m", "jobs.perplexity", "cluster=ray", "cluster.address=auto", "data=pydoc",
        "tracking=none", f"model.path={MODEL}", "cluster.windows_per_shard=1", "protocol.limit=2000",
        f"paths.results={tmp_path}", f"paths.cache={head.folder}/shared/cache", "protocol.window=64",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wanted = {
        "ray_pagemill_tokens_total", "ray_pagemill_shards_done_total", "ray_pagemill_shard_seconds_count",
        "ray_pagemill_workers_ready",
    }  # fmt: skip
    exported: dict[str, str] = {}
    try:
        while process.poll() is None and not wanted <= exported.keys():
            with urllib.request.urlopen(head.exporter, timeout=5) as answer:
                lines = [line for line in answer.read().decode().splitlines() if "pagemill" in line]
            exported = {line.split("{")[0].split(" ")[0]: line for line in lines if line[0] != "#"}
            time.sleep(0.5)
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert wanted <= exported.keys(), said
    assert f'host="{socket.gethostname()}"' in exported["ray_pagemill_tokens_total"]
    assert float(exported["ray_pagemill_workers_ready"].rpartition(" ")[2]) == 2
