"""Rollouts under load on a real API server, a true Deployment controller and a real Envoy, with a real `mlops-nb serve` for every pod: no request fails in any strategy, a sabotaged version is
taken back, and the orders of things that do lose requests are seen to lose them here too."""
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "rollout")]
from pods import SABOTAGED, World, make_bundle  # noqa: E402
from waiting import until  # noqa: E402

from mlops_nb.rollout.envoy import live_clusters  # noqa: E402
from mlops_nb.rollout.ports import Routes  # noqa: E402

pytestmark = pytest.mark.drill


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles"))


def ended(world, version):
    "Only one version is left: its pods, its processes, its weight"
    assert [r.version for r in world.target.revisions()] == [version] and {v: w for v, w in until(world.target.routed).weights.items() if w} == {version: 100}
    until(lambda: len(world.town.kubelet.pods) == world.replicas)


@pytest.mark.parametrize("strategy, replicas, more", [("canary", 1, {"steps": [25, 100]}), ("blue_green", 1, {}), pytest.param("rolling", 2, {}, marks=pytest.mark.soak), pytest.param("shadow", 1, {}, marks=pytest.mark.soak)])
def test_no_request_fails(cluster, bundle, tmp_path, strategy, replicas, more):
    with World(cluster, bundle, tmp_path, replicas) as world:
        record, load, after = world.roll(strategy, **more)
        assert record.state == "done", record.reason
        assert not load.failed, load.failed[:5]
        winner = "3" if strategy == "shadow" else "4"
        assert sum(n for v, n in after.items() if v != winner) == 0 and after[winner] >= 40
        ended(world, winner)
        print(f"{strategy}: {load.total} requests, {len(load.failed)} failed, at most {world.town.kubelet.most} pods")


def test_a_sabotaged_version_is_taken_back(cluster, bundle, tmp_path):
    with World(cluster, bundle, tmp_path, v4=SABOTAGED) as world:
        record, load, after = world.roll("canary", steps=[25, 100])
        assert record.state == "rolled_back" and "errors" in record.reason
        assert {version for _, status, version in load.failed if status == 500} <= {"4", None} and all(status == 500 for _, status, _ in load.failed)
        assert after.get("4", 0) == 0 and load.failed and sum(b["candidate"]["errors"] for b in record.blocks[:-1]) < 15      # with more it would have gone back a look before
        ended(world, "3")
        print(f"sabotaged: {len(load.failed)} of {load.total} failed, all with the candidate; over {load.failed[-1][0] - load.failed[0][0]:.1f} s")


def test_the_stable_version_restarted_by_its_deployment_controller(cluster, bundle, tmp_path):
    "`kubectl rollout restart`: new pods first, then the old ones linger while Envoy learns of it"
    with World(cluster, bundle, tmp_path) as world, world.load() as load:
        until(lambda: load.seen)
        name, before = "toy-m-3-aa11bb22", set(world.town.kubelet.pods)
        world.deployment(name, lambda d: (d["spec"]["template"]["metadata"].setdefault("annotations", {}).update({"restarted": "now"}), d)[1])
        until(lambda: not before & set(world.town.kubelet.pods))
        seen = load.total
        until(lambda: load.total > seen + 50)
        assert not load.failed, load.failed[:5]


def test_orders_that_lose_requests_are_seen_to_lose_them(cluster, bundle, tmp_path):
    "Pods ended while they have weight; and a selector rewritten, as others promote"
    with World(cluster, bundle, tmp_path) as world:
        world.target.ensure(world.new, 1, 0)
        until(lambda: world.target.ready(world.new).state == "ready")
        with world.load() as load:
            until(lambda: load.seen)
            world.deployment("toy-m-3-aa11bb22", lambda d: {**d, "spec": {**d["spec"], "replicas": 0}})
            until(lambda: load.failed)
        assert {status for _, status, _ in load.failed} == {503}
        with pytest.raises(Exception, match="100 % of the traffic"):
            world.target.remove(world.old, 0)


def test_a_pod_killed_under_load_comes_back_and_traffic_stays(cluster, bundle, tmp_path):
    "One of two pods is killed outright: what it held is lost, the rest goes on with the other as soon as Envoy knows, and no request is lost to its return"
    with World(cluster, bundle, tmp_path, replicas=2) as world, world.load() as load:
        until(lambda: load.seen)
        victim, back = next(iter(world.town.kubelet.pods.values())), lambda: victim.restarts == 1 and victim.ready
        victim.process.kill()
        until(lambda: live_clusters(world.town.gate.admin)["toy-m-3-aa11bb22"]["hosts"] == 1 or back())
        known = time.time()
        until(back)
        until(lambda: world.target.ready(world.old).state == "ready")
        seen = load.total
        until(lambda: load.total > seen + 100)
        assert not load.failed_since(known), (known, load.failed)
        assert Routes({"3": 100}).same(world.target.routed())


def test_the_api_server_and_etcd_away_under_load(cluster, bundle, tmp_path):
    "Traffic does not need them; the rollout waits, and goes on"
    with World(cluster, bundle, tmp_path) as world:
        def outage():
            until(lambda: (r := world.store.load("toy")) and r.state in ("analysing", "settling"))
            for process in (cluster.etcd, cluster.api):
                process.kill()
            time.sleep(1)
            for process in (cluster.etcd, cluster.api):
                process.run()
            cluster.until_ready()
        thread = threading.Thread(target=outage)
        thread.start()
        record, load, _ = world.roll("canary", steps=[50, 100], settle=300, deadline=300)
        thread.join()
        assert record.state == "done", record.reason
        assert not load.failed, load.failed[:5]
        ended(world, "4")
