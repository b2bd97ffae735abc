"""Engines against each other on one model: the same work in turns, each in a process of its own.

Shared machines swing by a factor of two within minutes, so nothing is compared that was not measured in the
same round. A case begins with every engine's settings: of those that `options_of` proposes for a peer the
fastest is kept, and running each once is the warm-up as well. Then come the rounds: every engine once, the
first place going round, and the machine's own limits between them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from pipeline.bench.limits import Limits
from pipeline.bench.players import Player, PlayerError, options_of
from pipeline.bench.work import Case

log = logging.getLogger(__name__)

_SETTLE_S = 0.5


@dataclass
class Timed:
    """What an engine did in a case.

    Attributes:
        options: its settings, the best of those in `tried`.
        tried: settings and what they came to, tokens/s.
        info, memory: what the player says of itself, and the kernel of its process at the end.
        speeds: tokens/s of each round.
        limits: GFLOP/s and GB/s of the machine at each round's two ends, their means.
        gflops, gb_per_s: the same over all rounds, medians.
    """

    engine: str
    case: Case
    options: Mapping[str, Any]
    tried: list[dict[str, Any]]
    info: Mapping[str, Any]
    memory: Mapping[str, Any] = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)
    limits: list[tuple[float, float]] = field(default_factory=list)
    gflops: float = 0.0
    gb_per_s: float = 0.0


@dataclass
class Contest:
    """Engines on one model, in one case after the other.

    Attributes:
        engines: ours first, then the peers.
        own: settings of ours.
        failures: what went wrong, a sentence each; an engine that fails in a case is left out of it.
    """

    model_path: str
    engines: Sequence[str]
    own: Mapping[str, Any]
    limits: Limits
    repeats: int
    failures: list[str] = field(default_factory=list)

    def run(self, case: Case) -> list[Timed]:
        """The case's rounds; the engines that finished them, in order."""
        with ExitStack() as stack:
            playing: dict[str, tuple[Player, Timed]] = {}
            for engine in self.engines:
                try:
                    playing[engine] = self._best(engine, case, stack)
                except PlayerError as error:
                    self._fail(engine, case, error)
            begun = len(self.limits.gflops)
            self.limits.take()
            for number in range(self.repeats):
                order = list(playing)
                for engine in order[number % len(order) :] + order[: number % len(order)] if order else ():
                    player, timed = playing[engine]
                    try:
                        timed.speeds.append(_tokens_per_s(player, case))
                    except PlayerError as error:
                        self._fail(engine, case, error)
                        del playing[engine]
                self.limits.take()
                for _, timed in playing.values():
                    timed.limits.append(self.limits.of_round())
            gflops, gb_per_s = self.limits.since(begun)
            for player, timed in playing.values():
                timed.memory, timed.gflops, timed.gb_per_s = player.memory(), gflops, gb_per_s
        return [timed for _, timed in playing.values()]

    def _best(self, engine: str, case: Case, stack: ExitStack) -> tuple[Player, Timed]:
        """A player with the fastest of its settings, which stays open, and has done the work once."""
        candidates = [self.own] if engine == self.engines[0] else options_of(engine, case.kind)
        tried: list[dict[str, Any]] = []
        best: tuple[float, Player, Mapping[str, Any]] | None = None
        for options in candidates:
            told: dict[str, Any] = {"options": dict(options), "tok_per_s": None}
            tried.append(told)
            try:
                player = stack.enter_context(self._open(engine, case, options))
                told["tok_per_s"] = speed = _tokens_per_s(player, case)
            except PlayerError as error:
                if best is None and options is candidates[-1]:
                    raise
                told["error"] = str(error)
                continue
            if best is not None and speed <= best[0]:
                player.close()
                continue
            if best is not None:
                best[1].close()
            best = speed, player, options
        assert best is not None, "without one the last candidate's error was raised"
        return best[1], Timed(engine, case, best[2], tried, best[1].info)

    def _open(self, engine: str, case: Case, options: Mapping[str, Any]) -> Player:
        return Player(
            engine,
            self.model_path,
            threads=self.limits.threads,
            cores=self.limits.cores,
            options=options,
            max_tokens=case.n_seqs * case.length,
            n_seqs=case.n_seqs,
        )

    def _fail(self, engine: str, case: Case, error: Exception) -> None:
        failure = f"{engine} in {case.name}: {error}"
        log.warning("%s", failure)
        self.failures.append(failure)


def _tokens_per_s(player: Player, case: Case) -> float:
    """One repetition, after a pause: threads of the engine before may go on spinning for a while."""
    time.sleep(_SETTLE_S)
    done = player.measure(case.kind, n_prompt=case.n_prompt, n_generate=case.n_generate, n_seqs=case.n_seqs)
    return done.n_tokens / done.seconds
