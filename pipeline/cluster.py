"""Where workers live: in this process, on a Ray of our own, or on an existing cluster. The one door to Ray.

Ray's helper processes are tied to the *thread* that started them (PR_SET_PDEATHSIG): they end with a driver
that is killed, and `RayExecutor.start` must not run in a thread that ends before the work does. Workers are
ordinary actors, never detached, so they end with their driver on any cluster.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline import events
from pipeline.capacity import RAY_BYTES
from pipeline.errors import ClusterUnreachable
from pipeline.executor import (
    WORKER,
    Executor,
    InlineExecutor,
    OnResult,
    ShardFailure,
    Task,
    publishing,
)
from pipeline.placement import Need, Place, Plan, plan
from pipeline.probe import Probes
from pipeline.ray_metrics import ClusterMetrics
from pipeline.ray_pool import Pool
from pipeline.runtime import available_cores, environment, prepare_local_ray, prepare_remote_ray, worker_env
from pipeline.survey import Survey
from pipeline.topology import look, usable_cores
from pipeline.versions import VersionCheck

if TYPE_CHECKING:
    from pipeline.settings import ClusterSettings, EngineSettings
    from pipeline.worker import WorkerSpec

__all__ = ["Executor", "InlineExecutor", "RayExecutor", "ShardFailure", "open_executor"]

PROBE_TIMEOUT_S = 5.0
OBJECT_STORE_BYTES = 80 << 20  # results are a few hundred bytes; Ray's floor is 75 MiB
_LONGEST_TEMP = 40  # Ray puts sockets below it, and a socket's path may have 107 bytes

log = logging.getLogger(__name__)


def open_executor(
    settings: ClusterSettings, engine: EngineSettings, factory: str = WORKER, need: Need | None = None
) -> Executor:
    """The executor that `cluster.kind` names; nothing is started yet.

    Args:
        factory: "module:callable" that makes a worker from a spec, importable on every node.
        need: what a worker takes; None where only its threads are known.
    """
    if settings.kind == "inline":
        return InlineExecutor(factory)
    return RayExecutor(settings, settings.threads_per_worker or engine.threads, factory, need)


def plan_of(settings: ClusterSettings, need: Need) -> Plan:
    """Where the workers of a run would go; none is started.

    Raises:
        ClusterUnreachable, SettingsError: see `placement.plan`.
    """
    if settings.kind != "ray":
        return plan_here(settings, need)
    executor = RayExecutor(settings, need.threads, need=need)
    try:
        return executor.plan()
    finally:
        executor.close()


def plan_here(settings: ClusterSettings, need: Need) -> Plan:
    """The plan of this host alone; whose models are the driver's own."""
    node = replace(look(), models=need.models)
    if settings.kind == "local" and node.left_bytes is not None:
        node = replace(node, left_bytes=max(0, node.left_bytes - RAY_BYTES))
    wanted = 1 if settings.kind == "inline" else settings.workers
    return plan([node], need, wanted=wanted, numa="none" if settings.kind == "inline" else settings.numa)


class RayExecutor:
    """A pool of Ray actors on a Ray of our own (`cluster=local`) or on an existing one (`cluster=ray`)."""

    def __init__(
        self, settings: ClusterSettings, threads: int, factory: str = WORKER, need: Need | None = None
    ) -> None:
        self.n_workers = settings.workers or max(1, usable_cores() // threads)
        self._settings, self._threads, self._factory = settings, threads, factory
        self._need = need or Need(threads)
        self._survey: Survey | None = None
        self._ray: Any = None
        self._pool: Pool | None = None
        self._temp_dir: str | None = None
        self._versions: VersionCheck | None = None
        self._metrics: ClusterMetrics | None = None

    def start(self, specs: Sequence[WorkerSpec]) -> list[dict[str, Any]]:
        made = self.plan()
        for line in made.lines():
            log.info("%s", line)
        for remark in made.remarks:
            log.warning("%s", remark)
        survey = self._survey
        if survey is None:
            raise RuntimeError("plan() leaves a survey")
        probes = self._probes(specs[0], made)
        survey.send_cached()
        survey.copy_models()
        variables = None if self._settings.kind == "local" else worker_env(self._threads)
        versions = self._versions

        def places_for(nodes: Sequence[Mapping[str, Any]]) -> list[Place]:
            fit = [node for node in nodes if versions is None or versions.admits(node)]
            return survey.places_for([node for node in fit if probes is None or probes.admits(node)])

        self._pool = Pool(self._ray, self._factory, specs, self._threads, variables, places_for)
        infos = self._pool.start()
        self.n_workers = len(infos)
        return infos

    def plan(self) -> Plan:
        """Connect, look at the nodes, and decide where workers go; none is started yet.

        Raises:
            ClusterUnreachable, SettingsError: see `placement.plan`.
        """
        s = self._settings
        if s.kind == "local":
            made = plan_here(s, self._need)
            self.n_workers = len(made.places)
            self._start_local()
            (node,) = self._nodes()
            made = made.on(node["NodeID"])
            self._survey = Survey(self._ray, self._need, wanted=self.n_workers, numa=s.numa)
            self._survey.adopt(made)
            return made
        self._join()
        self._survey = Survey(self._ray, self._need, wanted=s.workers, numa=s.numa)
        return self._survey.plan(self._nodes())

    def _probes(self, spec: WorkerSpec, made: Plan) -> Probes | None:
        """Have the nodes that get workers try where they can write; None on this host, where it was tried."""
        folder = getattr(spec, "run_dir", None)
        if self._settings.kind == "local" or folder is None:
            return None
        probes = Probes(self._ray, None if self._settings.collect else folder, spec.cache_dir)
        chosen = {planned.node.node_id for planned in made.nodes if planned.places}
        probes.require([node for node in self._nodes() if node["NodeID"] in chosen])
        return probes

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def run(self, tasks: Sequence[Task], on_result: OnResult) -> list[ShardFailure]:
        if self._pool is None:
            raise RuntimeError("run() before start()")
        with events.of_runs(tasks):
            return self._pool.run(tasks, publishing(on_result))

    def memory(self) -> list[dict[str, Any]]:
        return [] if self._pool is None else self._pool.memory()

    def close(self) -> None:
        ray, pool, self._ray, self._pool = self._ray, self._pool, None, None
        if self._survey is not None:
            self._survey.close()
        if self._metrics is not None:
            events.stop_listening(self._metrics)
        if ray is not None:
            if pool is not None:
                pool.kill()
            ray.shutdown()
        if self._temp_dir is not None:
            shutil.rmtree(self._temp_dir, ignore_errors=True)
            self._temp_dir = None

    def _start_local(self) -> None:
        """Start a Ray of this process: loopback only, no dashboard, nothing on standard output."""
        cpus = self.n_workers * self._threads
        if cpus > available_cores():
            log.warning(
                "%d workers of %d threads want %d cores, there are %d: they will get in each other's way",
                self.n_workers,
                self._threads,
                cpus,
                available_cores(),
            )
        prepare_local_ray()
        folder = tempfile.gettempdir()
        self._temp_dir = tempfile.mkdtemp(prefix="pm", dir=folder if len(folder) <= _LONGEST_TEMP else "/tmp")
        # Workers inherit this process's environment. Given as `runtime_env` instead, Ray throws away the
        # processes it has already started and starts others: 1.0 s more (median of 3 on two idle cores, 1.3 s
        # against 0.35 s).
        with environment(worker_env(self._threads)):
            self._connect(
                address="local",
                num_cpus=cpus,
                num_gpus=0,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=self._temp_dir,
            )
        if (address := self._ray.util.get_node_ip_address()) != "127.0.0.1":
            log.warning(
                "Ray listens on %s: it was imported before pipeline.cluster could keep it on loopback",
                address,
            )

    def _join(self) -> None:
        """Connect to an existing cluster, refusing early what `ray.init` would try for two minutes."""
        address = self._settings.address or os.environ.get("RAY_ADDRESS")
        if not address:
            raise ClusterUnreachable(
                "cluster=ray needs an address",
                "set cluster.address=HOST:6379 or RAY_ADDRESS, or use cluster=local",
            )
        if "://" in address:
            raise ClusterUnreachable(
                f"cluster.address={address}: expected HOST:PORT of the cluster's head, or auto",
                "run the command on a node of the cluster, or submit it there with `ray job submit`",
            )
        prepare_remote_ray()
        if address != "auto":
            _check_reachable(address)
        self._connect(address=address)
        self._versions = VersionCheck(self._ray)
        self._versions.require([node for node in self._ray.nodes() if node["Alive"]])
        self._metrics = ClusterMetrics(import_module("ray.util.metrics"))
        events.listen(self._metrics)

    def _connect(self, **options: Any) -> None:
        """`ray.init`, with our handler of SIGTERM kept: Ray's would skip the caller's clean-up."""
        import ray

        logging.getLogger("ray").setLevel(logging.WARNING)
        in_main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(log_to_driver=False, logging_level=logging.WARNING, **options)
        except Exception as error:
            if options["address"] == "local":
                raise ClusterUnreachable(
                    f"Ray could not be started here: {error}", "cluster=inline needs no Ray"
                ) from error
            raise ClusterUnreachable(
                f"cluster.address={options['address']}: {error}",
                "Ray, Python, RAY_AUTH_MODE and the token must be the same here as on the cluster",
            ) from error
        finally:
            if in_main:
                signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
        self._ray = ray


def _check_reachable(address: str) -> None:
    """Ask the head's standard gRPC health service; any answer of a gRPC server will do.

    Raises:
        ClusterUnreachable: no answer within `PROBE_TIMEOUT_S`.
    """
    host, _, port = address.rpartition(":")
    hint = "is the cluster up, and HOST:PORT its head's (6379 by default)? cluster=local needs none"
    if not host or not port.isdecimal():
        raise ClusterUnreachable(f"cluster.address={address}: expected HOST:PORT, or auto", hint)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterUnreachable(f"cluster.address={address} does not answer: {error}", hint) from error
    import ray

    grpc: Any = import_module("grpc")  # comes with Ray, without types

    if host in ("localhost", "127.0.0.1"):
        host = ray.util.get_node_ip_address()  # as ray.init will read it
    with grpc.insecure_channel(f"{host}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            check(b"", timeout=PROBE_TIMEOUT_S, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
                raise ClusterUnreachable(
                    f"cluster.address={address} answers, but {host}:{port} is not the head of a Ray cluster",
                    hint,
                ) from error
