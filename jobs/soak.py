"""Half an hour of kills: nothing is lost, nothing is counted twice, and every bit is the undisturbed run's.

    python -m jobs.soak MODEL.gguf [--seconds 1800] [--workers 2] [--folder FOLDER]
    make soak [SOAK_SECONDS=90]

A perplexity of many short documents, in shards of about a second, on a local Ray. Meanwhile a worker is
killed every 20 s on average, all of them every three minutes, the driver every five (in a shorter soak: three
times all, twice the driver); the driver is started again each time. The documents are a few dozen, over and
over, so the undisturbed table is known from one reading of them. Ends with a JSON object on a line; exit code
1 when something is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq

from pipeline import evaluate
from pipeline.errors import PipelineError
from pipeline.metrics import nll_sha256
from pipeline.runtime import setup_logging
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    ModelSettings,
    PathsSettings,
    PerplexitySettings,
    ProtocolSettings,
    TrackingSettings,
)

N_DOCUMENTS, CHARACTERS, WINDOW = 48, 700, 256
SHARD_S = 1.0
FILL = 0.8  # of the time that workers have, the rest being lost to kills
ALIKE = ("n_scored", "nll_sum_nats", "nll_sq_sum", "n_bytes", "n_words", "n_tokens", "weight")
MOST_AGAIN = 0.15
SAMPLE_S, POLL_S = 2.0, 0.2
WARM_S = 15.0  # of a driver's life: what it needs, it has by then
ROOM = {"fds": 8, "anonymous_bytes": 16 << 20, "object_store_bytes": 1 << 20}
"""By how much a driver's last quarter may exceed its first one."""

log = logging.getLogger("jobs.soak")


@dataclass
class Kill:
    """What was killed, and when, seconds since 1970."""

    what: str
    when: float


@dataclass
class Life:
    """A driver's, from its start to its end.

    Attributes:
        samples: of what must stay flat, with seconds since it started.
    """

    process: subprocess.Popen[bytes]
    log: Path
    began: float
    samples: list[tuple[float, dict[str, int]]] = field(default_factory=list)

    def workers(self) -> list[psutil.Process]:
        """Its workers' processes."""
        found = []
        with suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error, IndexError):
                    if child.cmdline()[0].startswith("ray::Hosted"):
                        found.append(child)
        return found

    def sample(self) -> None:
        """Note what must stay flat, unless it is just ending."""
        with suppress(psutil.Error, OSError, StopIteration, KeyError):
            driver = psutil.Process(self.process.pid)
            raylet = next(child for child in driver.children() if child.name() == "raylet")
            found = {
                "fds": driver.num_fds(),
                "anonymous_bytes": _status(driver.pid, "RssAnon"),
                "object_store_bytes": _status(raylet.pid, "RssShmem"),
            }
            self.samples.append((time.time() - self.began, found))

    def events(self) -> Iterator[dict[str, Any]]:
        """The events of its log."""
        for line in self.log.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and "event" in entry:
                    yield entry


def main(words: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    given = _parsed(sys.argv[1:] if words is None else words)
    setup_logging()
    with tempfile.TemporaryDirectory(prefix="pagemill-soak-") as own:
        try:
            summary = soak(given, given.folder or Path(own))
        except PipelineError as error:
            log.error("%s%s", error, f"; {error.hint}" if error.hint else "")
            return error.exit_code
    _show(summary)
    sys.stdout.write(json.dumps(summary) + "\n")
    return 0 if summary["ok"] else 1


def soak(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The undisturbed table, the disturbed one, and how they compare."""
    folder.mkdir(parents=True, exist_ok=True)
    text, whole = folder / "text.jsonl", folder / "documents.jsonl"
    documents = _documents()
    whole.write_text("".join(documents))
    undisturbed = evaluate(_settings(given.model, whole, folder, "undisturbed")).summary
    expected = _rows(Path(undisturbed["table"]))
    warm = evaluate(_settings(given.model, whole, folder, "warm")).summary
    window_s = warm["n_tokens"] / warm["tok_per_s"] / warm["n_windows"]
    per_shard = max(1, round(SHARD_S / window_s))
    n_shards = math.ceil(FILL * given.seconds * given.workers / (window_s * per_shard))
    n_windows = n_shards * per_shard
    text.write_text("".join(documents) * math.ceil(n_windows / undisturbed["n_windows"]))
    log.info("%d shards of %d windows, %.2f s each undisturbed", n_shards, per_shard, window_s * per_shard)

    command = [
        *(sys.executable, "-m", "jobs.perplexity", "tracking=none", "cluster=local"),
        *(f"cluster.workers={given.workers}", f"cluster.windows_per_shard={per_shard}"),
        *(f"model.path={given.model.resolve()}", f"data.path={text}", "data.format=jsonl", "data.name=soak"),
        *("protocol=document", f"protocol.window={WINDOW}", f"protocol.limit={n_windows}"),
        *(f"paths.results={folder / 'results'}", f"paths.cache={folder / 'cache'}"),
    ]
    began = time.time()
    lives, kills, last = _disturbed(command, given, folder)
    summary = {
        "job": "soak",
        "seconds": given.seconds,
        "wall_s": round(time.time() - began, 1),
        "n_workers": given.workers,
        "n_shards": n_shards,
        "n_windows": n_windows,
        "kills": {what: sum(k.what == what for k in kills) for what in ("worker", "all workers", "driver")},
        "n_drivers": len(lives),
        **_compared(last, expected, n_windows),
        **_again(lives, kills, given.workers, n_shards),
        **_times(lives, kills),
        **_growth(lives),
    }
    summary["ok"] = bool(
        summary["same_bits"]
        and summary["complete"]
        and summary["shards_again_share"] <= MOST_AGAIN
        and all(summary[f"{name}_growth_max"] <= room for name, room in ROOM.items())
    )
    return summary


def _disturbed(
    command: Sequence[str], given: argparse.Namespace, folder: Path
) -> tuple[list[Life], list[Kill], dict[str, Any]]:
    """Run the command until it is through, killing meanwhile; its lives, the kills, its last line."""
    chance, began = random.Random(given.seed), time.time()
    all_s, driver_s = min(180.0, given.seconds / 3), min(300.0, given.seconds / 2)
    next_one, next_all, next_driver = chance.expovariate(1 / given.kill_s), all_s, driver_s
    lives, kills = [_start(command, folder, 0)], list[Kill]()
    try:
        while True:
            time.sleep(POLL_S)
            life, now = lives[-1], time.time() - began
            if life.process.poll() is not None:
                if life.process.returncode == 0:
                    return lives, kills, _last_line(life)
                if not kills or kills[-1].what != "driver" or kills[-1].when < life.began:
                    log.warning("driver %d ended with %d", len(lives), life.process.returncode)
                    if len(lives) > len(kills) + 5:
                        return lives, kills, _last_line(life)
                lives.append(_start(command, folder, len(lives)))
                continue
            if not life.samples or now + began - life.began - life.samples[-1][0] > SAMPLE_S:
                life.sample()
            if now > given.seconds:
                continue
            if now > next_driver:
                next_driver += driver_s
                kills.append(Kill("driver", time.time()))
                life.process.kill()
                life.process.wait()
                continue
            workers = life.workers()
            if now > next_all and len(workers) == given.workers:
                next_all += all_s
                kills.append(Kill("all workers", time.time()))
                _kill(workers)
            elif now > next_one and workers:
                next_one = now + chance.expovariate(1 / given.kill_s)
                kills.append(Kill("worker", time.time()))
                _kill([chance.choice(workers)])
    finally:
        lives[-1].process.terminate()
        lives[-1].process.wait()


def _start(command: Sequence[str], folder: Path, number: int) -> Life:
    """Start the driver; Ray's sessions, which killed drivers leave, stay in the folder."""
    sessions = folder / "ray"
    sessions.mkdir(exist_ok=True)
    log_file = folder / f"driver-{number}.log"
    environment = {**os.environ, "PAGEMILL_LOG": "json", "TMPDIR": str(sessions)}
    with log_file.open("wb") as err, log_file.with_suffix(".out").open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
    return Life(process, log_file, time.time())


def _last_line(life: Life) -> dict[str, Any]:
    lines = life.log.with_suffix(".out").read_text().splitlines()
    return dict(json.loads(lines[-1])) if lines else {"ok": False, "table": None, "nll_sha256": None}


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)


def _compared(last: dict[str, Any], expected: list[dict[str, Any]], n_windows: int) -> dict[str, Any]:
    """Whether the table is the undisturbed one, over and over."""
    complete = bool(last["ok"])
    if not complete:
        log.error("the run did not end well: %s", last.get("error"))
        return {"complete": False, "same_bits": False, "nll_sha256": None}
    found = _rows(Path(last["table"]))
    wanted = [expected[i % len(expected)] for i in range(n_windows)]
    same = [row["window"] for row in found] == list(range(n_windows))
    same = same and all(a[name] == b[name] for a, b in zip(found, wanted, strict=True) for name in ALIKE)
    digest = nll_sha256(np.array([row["nll_sum_nats"] for row in wanted]))
    return {"complete": True, "same_bits": same and digest == last["nll_sha256"], "nll_sha256": digest}


def _again(lives: Sequence[Life], kills: Sequence[Kill], n_workers: int, n_shards: int) -> dict[str, Any]:
    """Shards that were begun more than once: at most those that a driver's workers had in their hands too."""
    again = n_workers * sum(kill.what == "driver" for kill in kills)
    for life in lives:
        again += sum(event["event"] in ("shard_retried", "shard_doubled") for event in life.events())
    return {"shards_again_at_most": again, "shards_again_share": round(again / n_shards, 4)}


def _times(lives: Sequence[Life], kills: Sequence[Kill]) -> dict[str, Any]:
    """Medians: from a kill to the event that tells of it, and from that to a worker that works again."""
    lost, recovered = [], []
    for life in lives:
        for event in life.events():
            if event["event"] == "worker_lost":
                lost.append(_seconds(event["time"]))
            elif event["event"] == "worker_back":
                recovered.append(float(event["recovery_s"]))
    detected = []
    for kill in kills:
        if kill.what != "driver" and (later := [when - kill.when for when in lost if when >= kill.when]):
            detected.append(min(later))
    return {
        "detection_s_median": round(median(detected), 2) if detected else None,
        "recovery_s_median": round(median(recovered), 2) if recovered else None,
        "recovery_s_max": round(max(recovered), 2) if recovered else None,
    }


def _growth(lives: Sequence[Life]) -> dict[str, Any]:
    """By how much each driver's last quarter exceeds its first one, at most."""
    grown: dict[str, list[float]] = {name: [0.0] for name in ROOM}
    for life in lives:
        steady = [sample for when, sample in life.samples if when > WARM_S]
        quarter = len(steady) // 4
        for name in ROOM if quarter else ():
            first = median(sample[name] for sample in steady[:quarter])
            grown[name].append(median(sample[name] for sample in steady[-quarter:]) - first)
    return {f"{name}_growth_max": max(values) for name, values in grown.items()}


def _show(summary: dict[str, Any]) -> None:
    kills = ", ".join(f"{n} x {what}" for what, n in summary["kills"].items())
    lines = {
        "killed": f"{kills} in {summary['wall_s']:.0f} s",
        "table": f"{summary['n_shards']} shards, {'the same bits' if summary['same_bits'] else 'OTHER BITS'}",
        "computed again": f"at most {summary['shards_again_at_most']}, {summary['shards_again_share']:.1%}",
        "a kill is noticed": f"after {summary['detection_s_median']} s (median)",
        "a worker is back": f"after {summary['recovery_s_median']} s more (median)",
        "the driver grew": f"{summary['fds_growth_max']:.0f} descriptors, "
        f"{summary['anonymous_bytes_growth_max'] / 1e6:.1f} MB, "
        f"object store {summary['object_store_bytes_growth_max'] / 1e6:.1f} MB",
    }
    for name, text in lines.items():
        log.info("%-18s %s", name, text)


def _documents() -> list[str]:
    """Lines of JSON, each a text of its own."""
    texts = "\n".join(topics[key] for key in sorted(topics))
    parts = [texts[i * CHARACTERS : (i + 1) * CHARACTERS] for i in range(N_DOCUMENTS)]
    return [json.dumps({"text": part}) + "\n" for part in parts]


def _settings(model: Path, text: Path, folder: Path, results: str) -> PerplexitySettings:
    """An undisturbed run, in this process."""
    return PerplexitySettings(
        model=ModelSettings(str(model)),
        data=DataSettings("soak", str(text), format="jsonl"),
        protocol=ProtocolSettings("document", WINDOW),
        cluster=ClusterSettings("inline", windows_per_shard=16),
        tracking=TrackingSettings("none"),
        paths=PathsSettings(str(folder / results), str(folder / "cache")),
    )


def _rows(table: Path) -> list[dict[str, Any]]:
    files = sorted(table.glob("shard-*.parquet"))
    rows = [row for path in files for row in pq.read_table(path, partitioning=None).to_pylist()]
    return sorted(rows, key=lambda row: int(row["window"]))


def _status(pid: int, key: str) -> int:
    """A size of a process, in bytes, as the kernel tells it."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise KeyError(key)


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="jobs.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--seconds", type=float, default=1800.0, help="of killing")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kill-s", type=float, default=20.0, help="between kills of a worker, on average")
    parser.add_argument("--folder", type=Path, help="keep texts, tables and logs there; a short path")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    if not given.model.is_file():
        parser.error(f"no model file at {given.model}; `make model` lays one down")
    return given


if __name__ == "__main__":
    sys.exit(main())
