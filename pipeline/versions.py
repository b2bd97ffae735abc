"""Whether driver and nodes run the same: what can change a bit, or break a call between them.

Every node is asked by a task, not by a look at its label: a task runs in the interpreter, and with the code,
that workers will have there. A run whose nodes differ is refused before work; a node that joins later and
differs is left out. `ray` is handed in, connected, by `pipeline.cluster`.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import provenance
from pipeline.errors import ClusterUnreachable

PACKAGES = ("ray", "numba", "numpy", "pyarrow")
ANSWER_TIMEOUT_S = 60.0  # the first task of a node starts a process and imports
_NAMED_AT_MOST = 5

log = logging.getLogger(__name__)


def here() -> dict[str, str]:
    """Versions of this process: Python's major and minor, the packages, pagemill, `engine.NUMERICS`."""
    import engine

    found = {"python": ".".join(platform.python_version_tuple()[:2]), "pagemill": provenance.version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"engine.NUMERICS": str(engine.NUMERICS)}


def differences(there: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """'numba 0.67.0, expected 0.68.1' for each version that differs."""
    return [
        f"{name} {there.get(name, 'unknown')}, expected {version}"
        for name, version in expected.items()
        if there.get(name) != version
    ]


class VersionCheck:
    """Asks nodes, each once.

    Args:
        ray: the module, connected.
        expected: versions that every node must have, the driver's.
    """

    def __init__(self, ray: Any, expected: Mapping[str, str] | None = None) -> None:
        self._ray = ray
        self._expected = dict(expected or here())
        self._asked: dict[str, Any] = {}  # node -> its answer on the way
        self._agrees: dict[str, bool] = {}

    def require(self, nodes: Sequence[Mapping[str, Any]], timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """Ask all nodes and wait for their answers; one that does not answer in time is left for later.

        Args:
            nodes: entries of `ray.nodes()` that are alive.

        Raises:
            ClusterUnreachable: nodes differ, named with what differs, or none answers.
        """
        for node in nodes:
            self._ask(node)
        if self._asked:
            self._ray.wait(list(self._asked.values()), num_returns=len(self._asked), timeout=timeout_s)
        wrong = [problem for node in nodes if (problem := self._settle(node)) is not None]
        if wrong:
            more = f"; and {len(wrong) - _NAMED_AT_MOST} more" if len(wrong) > _NAMED_AT_MOST else ""
            raise ClusterUnreachable(
                f"{len(wrong)} of {len(nodes)} nodes do not run what the driver runs: "
                + "; ".join(wrong[:_NAMED_AT_MOST])
                + more,
                "install the same on every node (jobs/README.md), or take the node out of the cluster",
            )
        if nodes and not self._agrees:
            raise ClusterUnreachable(
                f"no node said within {timeout_s:.0f} s what it runs",
                "do its workers start? see `ray status`",
            )
        for node in nodes:
            if node["NodeID"] in self._asked:
                log.warning("%s does not say yet what it runs; its workers wait until it does", _name(node))

    def admits(self, node: Mapping[str, Any]) -> bool:
        """Whether a node is known to run the same; asks one that is new, and does not wait for it."""
        self._ask(node)
        problem = self._settle(node)
        if problem is not None:
            log.warning("%s; no worker is started there", problem)
        return self._agrees.get(node["NodeID"], False)

    def _ask(self, node: Mapping[str, Any]) -> None:
        key = node["NodeID"]
        if key not in self._asked and key not in self._agrees:
            strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(key, soft=False)
            task = self._ray.remote(here).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
            self._asked[key] = task.remote()

    def _settle(self, node: Mapping[str, Any]) -> str | None:
        """Take a node's answer if it is there: what differs, None while there is nothing to complain of."""
        key, errors = node["NodeID"], self._ray.exceptions
        ref = self._asked.get(key)
        if ref is None or not self._ray.wait([ref], num_returns=1, timeout=0)[0]:
            return None
        del self._asked[key]
        try:
            wrong = differences(self._ray.get(ref), self._expected)
        except errors.RayTaskError as error:  # `here` cannot be imported, or raises
            self._agrees[key] = False
            return f"{_name(node)}: pagemill does not run there ({error.cause or type(error).__name__})"
        except errors.RayError as error:  # the node is going, or its process died: asked again if it stays
            log.warning("%s did not say what it runs: %s", _name(node), type(error).__name__)
            return None
        self._agrees[key] = not wrong
        return f"{_name(node)}: {', '.join(wrong)}" if wrong else None


def _name(node: Mapping[str, Any]) -> str:
    """A node as people know it: host, address, the beginning of its id."""
    host, address = node.get("NodeManagerHostname", "?"), node.get("NodeManagerAddress", "?")
    return f"node {host} ({address}, {node['NodeID'][:8]})"
