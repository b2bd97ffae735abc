"""How a run shows that it moves: a live bar on a terminal, log lines elsewhere; on standard error only."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from pipeline import events

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

LINE_EVERY_S = 30.0
HOSTS_IN_A_LINE, HOSTS_ON_A_TERMINAL = 8, 48
LATELY = 16  # shards of a host that its tokens/s is taken over

log = logging.getLogger(__name__)


class Progress(Protocol):
    """What a run tells while it works."""

    def start(
        self,
        total_windows: int,
        done_windows: int = 0,
        *,
        n_scored: int = 0,
        nll_sum: float = 0.0,
        mixed: bool = False,
    ) -> None:
        """Begin; windows that an earlier run finished count as done, with their sums where they are known.

        Args:
            mixed: windows of several runs, which have no perplexity in common.
        """
        ...

    def note(self, message: str) -> None:
        """Say in a few words what is being waited for."""
        ...

    def advance(self, n_windows: int, n_scored: int, nll_sum: float, n_tokens: int) -> None:
        """Add finished windows: targets scored, their summed NLL in nats, tokens put through the model."""
        ...

    def stop(self) -> None:
        """End; may be called twice."""
        ...


class Tally:
    """The figures every display shows, from sums."""

    def __init__(self, total_windows: int, done_windows: int, n_scored: int, nll_sum: float) -> None:
        self.total, self.done = total_windows, done_windows
        self._n_scored, self._nll_sum = n_scored, nll_sum
        self._n_new = self._n_tokens = 0
        self._began = time.monotonic()

    def add(self, n_windows: int, n_scored: int, nll_sum: float, n_tokens: int) -> None:
        self.done += n_windows
        self._n_new += n_windows
        self._n_scored += n_scored
        self._nll_sum += nll_sum
        self._n_tokens += n_tokens

    def perplexity(self) -> str:
        """exp(NLL / targets) so far, or a dash."""
        mean = self._nll_sum / self._n_scored if self._n_scored else math.inf
        return f"{math.exp(mean):.4f}" if mean < 700 else "-"

    def tokens_per_s(self) -> str:
        """Tokens of this run over the time since it started, or a dash."""
        return f"{self._n_tokens / max(time.monotonic() - self._began, 1e-9):.0f}" if self._n_tokens else "-"

    def eta(self) -> str:
        """Time left at the pace of this run, as m:ss or h:mm:ss, or a dash."""
        if not self._n_new:
            return "-"
        left = round((time.monotonic() - self._began) / self._n_new * (self.total - self.done))
        hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Hosts:
    """Tokens/s of each host that works, lately: listens to events of finished shards."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._done: dict[str, deque[tuple[float, float]]] = {}  # when, tokens; the first only says since when

    def __call__(self, event: events.Event) -> None:
        tokens, worker = event.fields.get("tokens"), str(event.fields.get("worker", ""))
        if event.name == events.SHARD_DONE and isinstance(tokens, int) and worker:
            begun = deque([(self._began, 0.0)], maxlen=LATELY + 1)
            self._done.setdefault(events.host_of(worker), begun).append((time.monotonic(), tokens))

    def rates(self) -> list[tuple[str, float]]:
        """Hosts, the slowest first; one that stands still gets slower and slower."""
        now = time.monotonic()
        rates = [
            (host, sum(tokens for _, tokens in list(done)[1:]) / max(now - done[0][0], 1e-9))
            for host, done in self._done.items()
        ]
        return sorted(rates, key=lambda rate: rate[1])

    def shown(self, at_most: int) -> list[str]:
        """'host 812 tok/s' for each of several hosts, [] for one: its rate is the run's."""
        rates = self.rates()
        if len(rates) < 2:
            return []
        more = [f"and {len(rates) - at_most} more"] if len(rates) > at_most else []
        return [f"{host} {rate:.0f} tok/s" for host, rate in rates[:at_most]] + more


class _Figures(TypedDict):
    ppl: str
    rate: str
    eta: str


class LineProgress:
    """A log line at most every `every_s` seconds, and one when the last window is done."""

    def __init__(self, every_s: float = LINE_EVERY_S) -> None:
        self._every_s = every_s
        self._last = time.monotonic()
        self._tally: Tally | None = None
        self._hosts = Hosts()

    def start(
        self,
        total_windows: int,
        done_windows: int = 0,
        *,
        n_scored: int = 0,
        nll_sum: float = 0.0,
        mixed: bool = False,
    ) -> None:
        self.stop()
        self._tally = Tally(total_windows, done_windows, n_scored, math.inf if mixed else nll_sum)
        self._last = time.monotonic()
        events.listen(self._hosts)
        log.info(
            "%d windows to score%s",
            total_windows - done_windows,
            f", {done_windows} done before" if done_windows else "",
        )

    def note(self, message: str) -> None:
        log.info("%s", message)

    def advance(self, n_windows: int, n_scored: int, nll_sum: float, n_tokens: int) -> None:
        tally = self._tally
        if tally is None:
            return
        tally.add(n_windows, n_scored, nll_sum, n_tokens)
        now = time.monotonic()
        if now - self._last >= self._every_s or tally.done >= tally.total:
            self._last = now
            hosts = self._hosts.shown(HOSTS_IN_A_LINE)
            log.info(
                "%d of %d windows, perplexity %s, %s tokens/s, %s left%s",
                tally.done,
                tally.total,
                tally.perplexity(),
                tally.tokens_per_s(),
                tally.eta(),
                f"; {', '.join(hosts)}" if hosts else "",
            )

    def stop(self) -> None:
        events.stop_listening(self._hosts)
        self._tally, self._hosts = None, Hosts()


class BarProgress:
    """A live bar on a terminal: windows, running perplexity, tokens/s, time left; below it the hosts."""

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console

        self._console = console or Console(stderr=True)
        self._tally: Tally | None = None
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._hosts = Hosts()

    def start(
        self,
        total_windows: int,
        done_windows: int = 0,
        *,
        n_scored: int = 0,
        nll_sum: float = 0.0,
        mixed: bool = False,
    ) -> None:
        self.stop()
        self._tally = Tally(total_windows, done_windows, n_scored, math.inf if mixed else nll_sum)
        events.listen(self._hosts)
        bar = self._display()
        self._task = bar.add_task(
            "", total=total_windows, completed=done_windows, note="scoring", **self._figures()
        )

    def note(self, message: str) -> None:
        bar = self._display()
        if self._task is None:
            self._task = bar.add_task("", total=None, note=message, ppl="-", rate="-", eta="-")
        else:
            bar.update(self._task, note=message)

    def advance(self, n_windows: int, n_scored: int, nll_sum: float, n_tokens: int) -> None:
        if self._tally is None or self._bar is None or self._task is None:
            return
        self._tally.add(n_windows, n_scored, nll_sum, n_tokens)
        self._bar.update(self._task, completed=self._tally.done, note="scoring", **self._figures())

    def stop(self) -> None:
        events.stop_listening(self._hosts)
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = self._tally = None
        self._hosts = Hosts()

    def _figures(self) -> _Figures:
        tally = self._tally
        assert tally is not None, "figures are shown between start and stop"
        return {"ppl": tally.perplexity(), "rate": tally.tokens_per_s(), "eta": tally.eta()}

    def _display(self) -> RichProgress:
        """The running display; standard output is left alone, standard error is written above the bar."""
        if self._bar is None:
            from rich.columns import Columns
            from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
            from rich.progress import Progress as RichProgress

            shown = self

            class Display(RichProgress):
                """The bar, and tokens/s of each host below it."""

                def get_renderables(self) -> Iterable[RenderableType]:
                    yield self.make_tasks_table(self.tasks)
                    if hosts := shown._hosts.shown(HOSTS_ON_A_TERMINAL):
                        yield Columns(hosts, padding=(0, 2))

            self._bar = Display(
                SpinnerColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn(
                    "windows · ppl {task.fields[ppl]} · {task.fields[rate]} tok/s · {task.fields[eta]} left"
                ),
                console=self._console,
                redirect_stdout=False,
                redirect_stderr=True,
                transient=True,
            )
            self._bar.start()
        return self._bar


def make_progress() -> Progress:
    """The live bar when standard error is a terminal, else log lines."""
    return BarProgress() if sys.stderr.isatty() else LineProgress()
