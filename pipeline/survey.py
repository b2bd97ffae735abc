"""Looks at the nodes of a connected Ray, and decides with `pipeline.placement` where workers go.

Every node is asked by a task of its own (`topology.look`), all at once. One that does not answer in time is
left out, named, and used when its answer comes: `places_for` follows the cluster while a run goes on, without
waiting for anything. Before a node's workers start it is sent what it lacks of the driver's cache
(pipeline/token_copies.py), and its NUMA nodes get their copies of the models.

What a node gets stays as it is while the node lives: memory or CPUs that come free later are for nodes that
join, and for the next run. `ray` is handed in, connected, by `pipeline.cluster`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import ClusterUnreachable, PipelineError
from pipeline.node_cache import Wanted
from pipeline.numa import Keeper
from pipeline.placement import MB, Need, NodePlan, Place, Plan, plan, sent_bytes
from pipeline.settings import is_url
from pipeline.token_copies import CacheFile, content, lay
from pipeline.topology import NodeInfo, look

LOOK_TIMEOUT_S = 60.0  # the first task of a node starts a process and imports
COPY_TIMEOUT_S = 900.0  # of a large model into each NUMA node's memory, once the node has it
SEND_TIMEOUT_S = 600.0  # of token streams; nodes that take longer join the run when they have them
_TELL_EVERY_S = 30.0
_NAMED_AT_MOST = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keeping:
    """Copies of a node's models on the way: the actor that holds them, and what it answers.

    `fetched` comes when models by URL are on the node, and may take any time; it is None where none is.
    """

    keeper: Any
    fetched: Any
    copied: Any


class Survey:
    """What is known of the nodes, and where workers go.

    Args:
        ray: the module, connected.
        wanted, numa: see `placement.plan`.
    """

    def __init__(self, ray: Any, need: Need, *, wanted: int | None = None, numa: str = "none") -> None:
        self._ray, self._need, self._wanted, self._numa = ray, need, wanted, numa
        self._looks: dict[str, Any] = {}  # node -> its answer on the way
        self._planned: dict[str, NodePlan] = {}
        self._keepers: dict[str, Keeping] = {}
        self._sending: dict[str, Any] = {}  # node -> what it lacks, on the way
        self._contents: dict[str, Any] = {}  # path -> a file of the driver's cache in the object store
        self._left_out: set[str] = set()

    def plan(self, nodes: Sequence[Mapping[str, Any]], timeout_s: float = LOOK_TIMEOUT_S) -> Plan:
        """Look at all nodes and wait for their answers.

        Args:
            nodes: entries of `ray.nodes()` that are alive.

        Raises:
            ClusterUnreachable, SettingsError: see `placement.plan`.
        """
        for node in nodes:
            self._ask(node["NodeID"])
        if self._looks:
            self._ray.wait(list(self._looks.values()), num_returns=len(self._looks), timeout=timeout_s)
        infos, absent = self._answers(nodes)
        for node in nodes:
            if node["NodeID"] in self._looks:
                absent[_name(node)] = f"does not answer within {timeout_s:.0f} s, left out until it does"
        made = plan(infos, self._need, wanted=self._wanted, numa=self._numa, absent=absent)
        self.adopt(made)
        return made

    def adopt(self, made: Plan) -> None:
        """Take a plan, made here or elsewhere, for what the nodes get."""
        self._planned |= {planned.node.node_id: planned for planned in made.nodes}

    def copy_models(self) -> None:
        """Give the NUMA nodes the copies that the plan wants, all hosts at once, and wait.

        Raises:
            ClusterUnreachable, ...: see `numa.Keeper.copy`.
        """
        self._begin_copies()
        fetching = [keeping.fetched for keeping in self._keepers.values() if keeping.fetched is not None]
        while fetching:
            _, fetching = self._ray.wait(fetching, num_returns=len(fetching), timeout=_TELL_EVERY_S)
            if fetching:
                log.info("waiting for models: %d nodes fetch them", len(fetching))
        deadline = time.monotonic() + COPY_TIMEOUT_S
        for node, keeping in self._keepers.items():
            timeout_s = max(0.0, deadline - time.monotonic())
            try:
                self._lend(node, self._ray.get(keeping.copied, timeout=timeout_s))
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause or error from None
            except self._ray.exceptions.RayError as error:
                raise ClusterUnreachable(
                    f"cluster.numa=mirror: the models could not be copied on {self._planned[node].name}: "
                    f"{type(error).__name__}",
                    "is there the memory? cluster.numa=distribute shares one copy",
                ) from error

    def send_cached(self) -> None:
        """Send nodes what they lack of the driver's cache, all at once, and wait; who takes long joins later.

        Raises:
            ClusterUnreachable: there is no node left that can take a worker.
        """
        self._begin_sending()
        if self._sending:
            refs = list(self._sending.values())
            self._ray.wait(refs, num_returns=len(refs), timeout=SEND_TIMEOUT_S)
            self._take_sent()
        if not any(planned.places for planned in self._planned.values()):
            told = [f"{planned.name}: {planned.reason}" for planned in self._planned.values()]
            raise ClusterUnreachable(
                f"no node can take a worker: {'; '.join(told[:_NAMED_AT_MOST])}",
                "paths.cache has to be a folder that every node can write, or one that they share",
            )

    def places_for(self, nodes: Sequence[Mapping[str, Any]]) -> list[Place]:
        """Where workers are to be now; nodes that are gone count no more, new ones when they have answered.

        Never waits. Places of a node do not change while it lives.

        Args:
            nodes: entries of `ray.nodes()` that are alive.
        """
        alive = {node["NodeID"]: node for node in nodes}
        for known in (self._looks, self._planned, self._keepers, self._sending):
            for gone in known.keys() - alive.keys():
                known.pop(gone)
        for node in alive.keys() - self._planned.keys() - self._left_out:
            self._ask(node)
        infos, absent = self._answers(nodes)
        for name, why in absent.items():
            log.warning("%s: %s; no worker is started there", name, why)
        self._place(infos)
        self._take_copies()
        self._take_sent()
        return [place for place in self._now().places if self._is_ready(place)]

    def close(self) -> None:
        """Let the copies go, before Ray is shut down; may be called twice."""
        self._sending.clear()
        self._contents.clear()
        keepers, self._keepers = self._keepers, {}
        closing = [keeping.keeper.close.remote() for keeping in keepers.values()]
        if closing:
            self._ray.wait(closing, num_returns=len(closing), timeout=5.0)
        for keeping in keepers.values():
            self._ray.kill(keeping.keeper, no_restart=True)

    def _ask(self, node: str) -> None:
        if node not in self._looks:
            need = self._need
            paths, files = ([file.path for file in files] for files in (need.models, need.files))
            task = self._ray.remote(look).options(num_cpus=0, max_retries=0, **self._on(node))
            self._looks[node] = task.remote(paths, need.cache, files, need.cached)

    def _answers(self, nodes: Sequence[Mapping[str, Any]]) -> tuple[list[NodeInfo], dict[str, str]]:
        """Take the answers that are there; what could not be looked at, and why."""
        infos, absent, errors = [], {}, self._ray.exceptions
        for node in nodes:
            key = node["NodeID"]
            ref = self._looks.get(key)
            if ref is None or not self._is_there(ref):
                continue
            del self._looks[key]
            try:
                info: NodeInfo = self._ray.get(ref)
            except errors.RayTaskError as error:  # pagemill is not there, or cannot read what it must
                self._left_out.add(key)
                absent[_name(node)] = f"cannot be looked at ({error.cause or type(error).__name__})"
            except (
                errors.RayError
            ) as error:  # the node is going, or its process died: asked again if it stays
                log.warning("%s was not looked at: %s", _name(node), type(error).__name__)
            else:
                infos.append(replace(info, node_id=key, slots=int(node["Resources"].get("CPU", 0))))
        return infos, absent

    def _place(self, infos: Sequence[NodeInfo]) -> None:
        """Plan nodes that have answered, and those that were not needed, for the workers that are missing."""
        n = len(self._now().places)
        if self._wanted is not None:
            spare = [planned.node for planned in self._planned.values() if planned.is_spare]
            infos = [*infos, *(spare if n < self._wanted else ())]
        if not infos:
            return
        if self._wanted == n:
            self._planned |= {info.node_id: NodePlan(info, (), is_spare=True) for info in infos}
            return
        crowded = {planned.node.host for planned in self._planned.values() if planned.places}
        wanted = None if self._wanted is None else self._wanted - n
        try:
            made = plan(infos, self._need, wanted=wanted, numa=self._numa, crowded=crowded)
        except PipelineError as error:
            log.warning("no worker is started on nodes that joined: %s", error)
            self._left_out |= {info.node_id for info in infos}
            return
        self.adopt(made)
        for line in made.lines():
            log.info("joined: %s", line)
        self._begin_copies()
        self._begin_sending()

    def _begin_copies(self) -> None:
        need = self._need
        models = [
            Wanted(model.path, model.sha256, need.limit_bytes) if is_url(model.path) else model.path
            for model in need.models
        ]
        for node, planned in self._planned.items():
            if planned.copies and node not in self._keepers:
                keeper = (
                    self._ray.remote(Keeper).options(num_cpus=0, max_restarts=0, **self._on(node)).remote()
                )
                is_remote = any(isinstance(model, Wanted) for model in models)
                fetched = keeper.fetch.remote(models, need.cache) if is_remote else None
                copied = keeper.copy.remote(models, planned.copies, need.cache)
                self._keepers[node] = Keeping(keeper, fetched, copied)

    def _take_copies(self) -> None:
        """Lend copies that are finished since; a node where they could not be made works without."""
        for node, keeping in self._keepers.items():
            if self._planned[node].folders or not self._is_there(keeping.copied):
                continue
            try:
                self._lend(node, self._ray.get(keeping.copied))
            except Exception as error:
                log.warning(
                    "%s has no copies of the model: %s",
                    self._planned[node].name,
                    " ".join(str(error).split()),
                )
                self._planned[node] = replace(self._planned[node], copies=())

    def _lend(self, node: str, folders: Mapping[int, str]) -> None:
        planned = self._planned[node]
        places = tuple(
            replace(place, mirror=None if place.numa_node is None else folders.get(place.numa_node))
            for place in planned.places
        )
        self._planned[node] = replace(planned, places=places, folders=tuple(folders.values()))

    def _begin_sending(self) -> None:
        """Send what nodes with workers lack; each file is put into the object store once."""
        known = {file.path: file for file in self._need.cached}
        for node, planned in self._planned.items():
            if not planned.places or not planned.node.lacking or node in self._sending:
                continue
            files = [known[path] for path in planned.node.lacking]
            task = self._ray.remote(lay).options(num_cpus=0, max_retries=0, **self._on(node))
            self._sending[node] = task.remote(files, *(self._put(file) for file in files))

    def _put(self, file: CacheFile) -> Any:
        if file.path not in self._contents:
            self._contents[file.path] = self._ray.put(content(file))
        return self._contents[file.path]

    def _take_sent(self) -> None:
        """Let workers start where everything has arrived; a node that cannot keep it gets none."""
        for node, ref in list(self._sending.items()):
            if not self._is_there(ref):
                continue
            del self._sending[node]
            planned = self._planned[node]
            try:
                self._ray.get(ref)
            except Exception as error:
                why = " ".join(str(getattr(error, "cause", None) or error).split())
                log.warning("%s: %s; no worker is started there", planned.name, why)
                self._planned[node] = NodePlan(planned.node, (), reason=why)
            else:
                n_bytes = sent_bytes(planned.node, self._need)
                log.info("%s: %.1f MB of tokens were sent", planned.name, n_bytes / MB)
                self._planned[node] = replace(planned, node=replace(planned.node, lacking=()))
        if not self._sending:
            self._contents.clear()

    def _is_there(self, ref: Any) -> bool:
        return bool(self._ray.wait([ref], num_returns=1, timeout=0)[0])

    def _is_ready(self, place: Place) -> bool:
        planned = self._planned[place.node_id]
        return not planned.node.lacking and (not planned.copies or bool(planned.folders))

    def _now(self) -> Plan:
        return Plan(tuple(self._planned.values()), self._need)

    def _on(self, node: str) -> dict[str, Any]:
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        return {"scheduling_strategy": strategy}


def _name(node: Mapping[str, Any]) -> str:
    return f"{node.get('NodeManagerHostname', '?')} ({node['NodeID'][:8]})"
