"""Where workers go, on machines of fake trees; and a run's own plan on the real one."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from pathlib import Path

import pytest
from fake_engine import install
from hypothesis import given
from hypothesis import strategies as st

from pipeline import cluster, evaluate, evaluate_all
from pipeline.capacity import RAY_BYTES
from pipeline.cpu_sets import spread
from pipeline.errors import ClusterUnreachable, SettingsError
from pipeline.placement import Need, Place, Plan, plan
from pipeline.settings import (
    NUMA_STRATEGIES,
    ClusterSettings,
    DataSettings,
    EngineSettings,
    ModelSettings,
    PathsSettings,
    PerplexitySettings,
    ProtocolSettings,
    TrackingSettings,
)
from pipeline.sweep import Point
from pipeline.topology import ModelFile, NodeInfo
from tests.pipeline.sys_trees import GB, host

ONE_GB = Need(1, worker_bytes=GB)
MODEL = ModelFile("/m.gguf", 10 * GB, 10 * GB, "ab" * 32)


def counts(made: Plan) -> dict[str, int]:
    return {node.node.host: len(node.places) for node in made.nodes}


def test_a_worker_a_core_whatever_its_threads() -> None:
    made = plan([host(2, 4, smt=2), host(1, 3, name="b")], Need(1, GB))
    assert counts(made) == {"a": 8, "b": 3}
    first = made.nodes[0].places
    assert [place.cpus for place in first] == [(i, i + 8) for i in range(8)]
    assert [place.numa_node for place in first] == [0] * 4 + [1] * 4
    assert [place.node_id[0] for place in made.places[:7]] == ["a", "b", "a", "b", "a", "b", "a"]


def test_memory_leaves_fewer_and_says_so() -> None:
    made = plan([host(cores=8, left=int(3.5 * GB)), host(cores=8, left=None, name="b")], ONE_GB)
    assert counts(made) == {"a": 3, "b": 8}
    assert made.nodes[0].reason == "a worker takes 1.0 GB, 3.5 GB are left"
    assert (made.nodes[0].bytes, made.nodes[1].reason) == (3 * GB, "")
    assert [len(place.cpus) for place in made.nodes[0].places] == [2, 3, 3], "all cores are shared out"


@pytest.mark.parametrize(("load", "n"), [("mmap", 30), ("mlock", 20), ("copy", 2)])
def test_weights_that_do_not_give_way_take_memory(load: str, n: int) -> None:
    need = Need(1, GB, (MODEL, ModelFile("/small.gguf", GB)), load)
    assert counts(plan([host(cores=99, left=30 * GB)], need)) == {"a": n}


@pytest.mark.parametrize(("load", "n"), [("mmap", 30), ("mlock", 19), ("copy", 2)])
def test_models_that_are_open_at_once_count_together(load: str, n: int) -> None:
    need = Need(1, GB, (MODEL, ModelFile("/small.gguf", GB)), load, at_once=True)
    assert counts(plan([host(cores=99, left=30 * GB)], need)) == {"a": n}


def test_ray_has_the_last_word_on_its_cpus() -> None:
    made = plan([host(cores=8, slots=6), host(cores=8, slots=3, name="b")], Need(2, GB))
    assert counts(made) == {"a": 3, "b": 1}
    assert sorted(len(place.cpus) for place in made.nodes[0].places) == [2, 3, 3]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [(1, (1, 0)), (3, (2, 1)), (5, (3, 2)), (6, (4, 2)), (7, (5, 2)), (9, (6, 3)), (12, (8, 4))],
)
def test_a_number_is_spread_and_squeezed_in_only_when_cores_are_out(
    wanted: int, expected: tuple[int, int]
) -> None:
    """Of four cores with eight threads, and of two with four, as Ray counts them."""
    nodes = [host(cores=4, smt=2, slots=8), host(cores=2, smt=2, slots=4, name="b")]
    made = plan(nodes, ONE_GB, wanted=wanted)
    assert tuple(counts(made).values()) == expected
    assert made.remarks == ()
    assert [node.is_spare for node in made.nodes] == [False, expected[1] == 0]


def test_what_does_not_fit_is_told() -> None:
    assert plan([host(cores=2, slots=2)], ONE_GB, wanted=5).remarks == ("5 workers are wanted, 2 fit",)
    made = plan([host(cores=2)], ONE_GB, wanted=5)
    assert (counts(made), made.remarks) == ({"a": 5}, ()), "a Ray of our own has as many CPUs as we say"
    assert {place.cpus for place in made.places} == {()}, "they take turns: nobody is bound"


def test_the_threads_of_a_worker_are_neighbours_in_one_numa_node_where_that_is_possible() -> None:
    made = plan([host(2, 8)], Need(3, GB))
    assert [place.numa_node for place in made.places] == [0, 0, None, 1, 1]
    assert len({cpu for place in made.places for cpu in place.cpus}) == 16
    made = plan([host(2, 8)], Need(4, GB))
    assert [place.cpus for place in made.places] == [tuple(range(i, i + 4)) for i in range(0, 16, 4)]
    assert plan([host(2, 2)], Need(3, GB)).places == [Place("a" * 8, (0, 1, 2, 3))]
    assert len(plan([host(2, 2, slots=4)], Need(3, GB), numa="distribute").places) == 1


@pytest.mark.parametrize(
    ("numa", "nodes", "widths"),
    [
        ("none", [0, 0, 0], [1, 1, 2]),
        ("distribute", [0, 0, 1], [2, 2, 4]),
        ("mirror", [0, 0, 1], [2, 2, 4]),
        ("isolate", [1, 1, 1], [1, 1, 2]),
        ("numactl", [None, None, None], [0, 0, 0]),
    ],
)
def test_strategies_lay_three_workers_out_over_two_sockets(
    numa: str, nodes: list[int], widths: list[int]
) -> None:
    made = plan([host(2, 4, here=1)], ONE_GB, wanted=3, numa=numa)
    assert [place.numa_node for place in made.places] == nodes
    assert [len(place.cpus) for place in made.places] == widths


@pytest.mark.parametrize(
    ("numa", "n"), [("none", 8), ("distribute", 8), ("mirror", 8), ("isolate", 4), ("numactl", 8)]
)
def test_strategies_fill_two_sockets(numa: str, n: int) -> None:
    made = plan([host(2, 4)], ONE_GB, numa=numa)
    assert len(made.places) == n
    assert made.nodes[0].copies == ((0, 1) if numa == "mirror" else ())


@pytest.mark.parametrize(
    ("numa", "expected"),
    [
        ("none", {()}),
        ("numactl", {()}),
        ("isolate", {(0, 1, 2, 3)}),
        ("distribute", {(0, 1, 2, 3), (4, 5, 6, 7)}),
        ("mirror", {(0, 1, 2, 3), (4, 5, 6, 7)}),
    ],
)
def test_cores_that_others_use_too_bind_nobody_to_one(numa: str, expected: set[tuple[int, ...]]) -> None:
    for made in (
        plan([host(2, 4, quota=3.5)], ONE_GB, numa=numa),
        plan([host(2, 4, slots=4)], ONE_GB, numa=numa, crowded={"a"}),
        plan([host(2, 4)], ONE_GB, wanted=20, numa=numa),
    ):
        assert {place.cpus for place in made.places} == expected
    assert len(plan([host(2, 4, quota=3.5)], ONE_GB, numa=numa).places) == 3


def test_ray_nodes_of_one_host_share_its_cores_and_memory() -> None:
    two = [host(cores=4, slots=2, node_id=i, left=4 * GB) for i in "xy"]
    made = plan(two, ONE_GB)
    assert sorted(place.cpus for place in made.places) == [(0,), (1,), (2,), (3,)]
    three = [host(cores=2, slots=1, node_id=i, left=6 * GB) for i in "xyz"]
    assert [place.cpus for place in plan(three, ONE_GB).places] == [()] * 3
    assert counts(plan([host(cores=8, slots=8, node_id=i, left=3 * GB) for i in "xy"], ONE_GB)) == {"a": 1}


@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 2),
    st.integers(1, 6),
    st.none() | st.integers(1, 30),
    st.sampled_from(NUMA_STRATEGIES),
)
def test_no_cpu_is_given_twice_while_there_are_enough(
    n_nodes: int, cores: int, smt: int, threads: int, wanted: int | None, numa: str
) -> None:
    node = host(n_nodes, cores, smt=smt)
    made = plan([node], Need(threads, 1), wanted=wanted, numa=numa)
    n = len(made.places)
    assert n == wanted or (wanted is None and n >= 1)
    used = Counter(cpu for place in made.places for cpu in place.cpus)
    n_cores = len(node.cores) if numa != "isolate" else cores
    room = sum(cores // threads for _ in range(n_nodes if numa != "isolate" else 1))
    if numa != "numactl" and n <= room:
        assert set(used.values()) == {1}
        assert all(len(place.cpus) >= threads * smt for place in made.places)
        assert all(place.numa_node is not None for place in made.places)
    if numa == "none" and n * threads <= n_cores:
        assert sum(used.values()) <= n_cores * smt
        assert set(used.values()) == {1}
    if numa in ("distribute", "mirror") and n <= room:
        each = Counter(place.numa_node for place in made.places)
        assert max(each.values()) - min([*each.values(), *([0] if len(each) < n_nodes else [])]) <= 1
    on = {cpu: core.numa_node for core in node.cores for cpu in core.cpus}
    assert all(
        {on[cpu] for cpu in place.cpus} == {place.numa_node}
        for place in made.places
        if place.numa_node is not None
    )


@given(st.lists(st.integers(0, 9)), st.none() | st.integers(0, 40))
def test_spread_takes_turns(capacity: list[int], wanted: int | None) -> None:
    taken = spread(capacity, wanted)
    assert sum(taken) == min(sum(capacity), math.inf if wanted is None else wanted)
    for n, room in zip(taken, capacity, strict=True):
        assert n <= room
        assert all(n == room or n + 1 >= other for other in taken)


def elsewhere(**there: object) -> NodeInfo:
    return host(models=(ModelFile("/m.gguf", **there),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("node", "why"),
    [
        (
            elsewhere(problem="/m.gguf: No such file or directory"),
            r"cannot be opened there: /m\.gguf: No such",
        ),
        (elsewhere(n_bytes=7), r"another file there: 7 bytes, expected 10,000,000,000"),
        (elsewhere(n_bytes=10 * GB, sha256="cd" * 32), r"SHA-256 cdcd[cd]+, expected abab"),
    ],
)
def test_a_node_without_the_model_is_left_out_and_refused_when_it_is_alone(node: NodeInfo, why: str) -> None:
    need = Need(1, GB, (MODEL,))
    with pytest.raises(
        ClusterUnreachable, match=rf"no node can take a worker: a \(aaaaaaaa\): .*{why}"
    ) as caught:
        plan([node], need)
    assert "same path" in caught.value.hint
    good = host(name="b", models=(MODEL,))
    made = plan([node, good], need)
    assert counts(made) == {"a": 0, "b": 4}
    assert "no worker, " in made.lines()[0]


def test_files_beside_the_models_have_to_be_there_too() -> None:
    logits = ModelFile("/base.logits", 9, sha256="ef" * 32)
    need = Need(1, GB, (MODEL,), files=(logits,))
    another = ModelFile("/base.logits", 9, sha256="00" * 32)
    with pytest.raises(ClusterUnreachable, match=r"/base\.logits is another file there: SHA-256 0000"):
        plan([host(models=(MODEL, another))], need)
    made = plan([host(models=(MODEL, logits))], need)
    assert (counts(made), "of the model in the page cache" in made.lines()[0]) == ({"a": 4}, True)


@pytest.mark.parametrize(
    ("here", "n_bytes"),
    [
        ({"n_bytes": 10 * GB, "sha256": "ab" * 32}, 0),
        ({"n_bytes": 10 * GB}, 0),
        ({"n_bytes": 10 * GB, "sha256": "cd" * 32}, 10 * GB),
        ({"n_bytes": 7}, 10 * GB),
        ({"problem": "cut short"}, 10 * GB),
        ({}, 10 * GB),
    ],
)
def test_an_older_or_broken_copy_of_a_url_is_fetched_anew(here: dict[str, object], n_bytes: int) -> None:
    url = "https://h/m.gguf"
    need = Need(1, GB, (ModelFile(url, 10 * GB, sha256="ab" * 32),))
    made = plan([host(models=(ModelFile(url, **here),))], need)  # type: ignore[arg-type]
    assert (counts(made), made.told()[0]["fetch_bytes"]) == ({"a": 4}, n_bytes)


def test_a_digest_that_is_not_known_is_no_reason() -> None:
    need = Need(1, GB, (MODEL,))
    assert counts(plan([elsewhere(n_bytes=10 * GB)], need)) == {"a": 4}


@pytest.mark.parametrize(
    ("nodes", "absent", "message"),
    [
        ([], {}, "the cluster has no node"),
        ([], {"b (1f)": "does not answer within 60 s"}, r"b \(1f\): does not answer within 60 s"),
        ([host(slots=1)], {}, "Ray has 1 CPUs there, a worker wants 2"),
        ([host(cores=1, slots=9)], {}, "1 CPUs may be used, a worker has 2 threads"),
    ],
)
def test_a_cluster_without_a_usable_node_is_refused(nodes, absent, message: str) -> None:
    with pytest.raises(ClusterUnreachable, match=message) as caught:
        plan(nodes, Need(2, GB), absent=absent)
    assert caught.value.exit_code == 2


def test_no_memory_anywhere_is_refused_with_figures() -> None:
    nodes = [host(left=int(0.4 * GB)), host(left=int(0.3 * GB), name="b"), host(slots=0, name="c")]
    with pytest.raises(
        SettingsError, match=r"one worker, 1\.0 GB: a \(a+\) has 0\.4 GB; b \(b+\) has 0\.3 GB$"
    ):
        plan(nodes, ONE_GB)
    with pytest.raises(SettingsError, match=r"1\.0 GB beside 10\.0 GB of locked weights"):
        plan([host(left=10 * GB)], Need(1, GB, (MODEL,), "mlock"))
    many = [host(left=0, name=f"n{i}") for i in range(9)]
    with pytest.raises(SettingsError, match=r"; and 4 more$"):
        plan(many, ONE_GB)


def test_a_mirror_wants_memory_on_each_numa_node() -> None:
    need = Need(1, GB, (MODEL,))
    made = plan([host(2, 4, free=14 * GB)], need, numa="mirror")
    assert (made.nodes[0].copies, made.nodes[0].bytes) == ((0, 1), 28 * GB)
    with pytest.raises(
        SettingsError, match=r"NUMA node 0 of a .* has 13\.9 GB left; a copy .* 10\.0 GB, 4 work"
    ):
        plan([host(2, 4, free=int(13.9 * GB))], need, numa="mirror")
    with pytest.raises(SettingsError, match="no node has the memory of one worker"):
        plan([host(2, 4, left=20 * GB)], need, numa="mirror")
    assert plan([host(2, 4, free=None)], need, numa="mirror").nodes[0].copies == (0, 1)
    assert plan([host(2, 4)], need, numa="mirror", wanted=1).nodes[0].copies == (0,)


def test_a_mirror_of_one_numa_node_is_none_and_that_is_said() -> None:
    made = plan([host(1, 4), host(2, 2, name="b")], Need(1, GB, (MODEL,)), numa="mirror")
    assert [node.copies for node in made.nodes] == [(), (0, 1)]
    assert len(made.remarks) == 1
    assert "a (aaaaaaaa) has one NUMA node" in made.remarks[0]


def test_a_plan_is_a_line_and_an_object_for_each_node() -> None:
    here = ModelFile("/m.gguf", 10 * GB, 4 * GB)
    far = ModelFile("https://h/n.gguf", 2 * GB)
    need = Need(2, GB, (MODEL, far))
    made = plan([host(2, 2, models=(here, ModelFile(far.path)))], need, numa="mirror")
    (line,) = made.lines()
    assert line == (
        "a (aaaaaaaa): 2 workers of 2 threads on CPUs 0-1; 2-3, 26.0 GB of 100.0 GB of memory, "
        "4,000 of 12,000 MB of 2 models in the page cache, 2,000 MB to fetch, "
        "2 copies of 2 models, one for each NUMA node"
    )
    (told,) = json.loads(json.dumps(made.told()))
    assert {key: told[key] for key in ("node", "host", "n_workers", "cpus", "numa_nodes", "fetch_bytes")} == {
        "node": "aaaaaaaa",
        "host": "a",
        "n_workers": 2,
        "cpus": ["0-1", "2-3"],
        "numa_nodes": [0, 1],
        "fetch_bytes": 2 * GB,
    }
    assert (told["memory_bytes"], told["memory_left_bytes"], told["reason"]) == (26 * GB, 100 * GB, None)


@pytest.fixture
def scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Settings of a small run on the fake engine, which wants 1,000 bytes for each token of a batch."""
    install(monkeypatch)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(9000))
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 10)

    def settings(kind="local", engine=None, **given):
        return PerplexitySettings(
            model=ModelSettings(str(tmp_path / "m.gguf")),
            data=DataSettings(path=str(tmp_path / "t.txt")),
            protocol=ProtocolSettings(window=32),
            engine=engine or EngineSettings(),
            cluster=ClusterSettings(kind, windows_per_shard=1, **given),
            tracking=TrackingSettings("none"),
            paths=PathsSettings(str(tmp_path / "results"), str(tmp_path / "cache")),
            dry_run=True,
        )

    return settings


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch):
    """This machine is another one."""
    from pipeline import perplexity

    def become(**given) -> None:
        monkeypatch.setattr(cluster, "look", lambda: host(cores=8, node_id="", **given))
        monkeypatch.setattr(perplexity, "usable_cores", lambda: 8)

    become()
    return become


def test_a_dry_run_shows_where_workers_would_go(
    scored, eight_cores, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "pipeline"):
        s = evaluate(scored()).summary
    (node,) = s["nodes"]
    assert (s["n_workers"], node["n_workers"], node["cpus"], node["node"]) == (8, 8, list("01234567"), None)
    assert (node["fetch_bytes"], node["host"]) == (0, "a")
    assert s["estimated_s"] > 0
    assert "no earlier run of this model here" in s["estimated_from"][0]
    assert "a: 8 workers of 1 thread on CPUs 0; 1; 2;" in caplog.text
    assert evaluate(scored("inline")).summary["nodes"][0]["n_workers"] == 1


def test_a_dry_run_has_fewer_workers_where_memory_is_short(scored, eight_cores) -> None:
    worker = evaluate(scored(workers=1)).summary["nodes"][0]["memory_bytes"]
    eight_cores(left=RAY_BYTES + 3 * worker + 1)
    s = evaluate(scored()).summary
    assert (s["n_workers"], "are left" in s["nodes"][0]["reason"]) == (3, True)
    eight_cores(left=RAY_BYTES + worker - 1)
    with pytest.raises(SettingsError, match="no node has the memory of one worker"):
        evaluate(scored())


def test_a_sweeps_dry_run_shows_it_once(scored, eight_cores) -> None:
    settings = scored(workers=2)
    s = evaluate_all([Point({"protocol.window": 32}, settings)]).summary
    assert (s["n_workers"], [node["n_workers"] for node in s["nodes"]]) == (2, [2])


def test_an_unknown_strategy_and_no_workers_are_refused(scored) -> None:
    with pytest.raises(SettingsError, match=r"cluster\.numa=mirrors is not known; did you mean mirror\?"):
        evaluate(scored(numa="mirrors"))
    with pytest.raises(SettingsError, match=r"cluster\.workers=0 is too small"):
        evaluate(scored(workers=0))
    for load in ("copy", "mlock"):
        with pytest.raises(SettingsError, match=rf"cluster\.numa=mirror and engine\.load={load}"):
            evaluate(scored(numa="mirror", engine=EngineSettings(load=load)))
    (warning,) = evaluate(scored("inline", numa="isolate")).warnings
    assert "cluster.numa=isolate is ignored" in warning
