"""What the pool (pipeline/ray_pool.py) knows of an actor, and of a call that ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.attempts import Attempt
    from pipeline.placement import Place


class LetGo(Exception):
    """The pool made an end of an actor: its worker hung, or its node is gone."""


@dataclass(eq=False)
class Actor:
    """An actor in its place. `info` is what it said of itself.

    Attributes:
        file: that its last shard had open; of `known` ones it has finished a shard.
        call: reference of the one in flight; `attempt` is what it is of, None for a probe.
        then: makes the call that follows the one in flight, which fetches a model; None where none does.
    """

    place: Place
    handle: Any
    is_ready: bool = False
    info: dict[str, Any] | None = None
    file: str | None = None
    known: set[str] = field(default_factory=set)
    call: Any = None
    attempt: Attempt | None = None
    then: Callable[[], Any] | None = None

    @property
    def node(self) -> str:
        """Ray's id of its node."""
        return self.place.node_id

    @property
    def name(self) -> str | None:
        """HOST:PID, None before it was ready."""
        return None if self.info is None else f"{self.info.get('host', '?')}:{self.info.get('pid', '?')}"


@dataclass(frozen=True)
class Ended:
    """An attempt's call that ended: its result, or why there is none."""

    actor: Actor
    attempt: Attempt
    result: Any = None
    error: BaseException | None = None
    is_ours: bool = False
