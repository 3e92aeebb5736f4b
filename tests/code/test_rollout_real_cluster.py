"The Kubernetes target on a real API server with etcd and controller manager, with the rights of a Role: the contracts, whole rollouts, and the API server killed in between."
import signal
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "rollout")]
import api_contract  # noqa: E402
import contract  # noqa: E402
from real_cluster import moved  # noqa: E402
from engines import Rolled  # noqa: E402
from fake_cluster import ROUTE  # noqa: E402
from worlds import ROUTES, ClusterWorld  # noqa: E402

from mlops_nb.core import MlopsError  # noqa: E402
from mlops_nb.rollout.cluster import Api  # noqa: E402
from mlops_nb.rollout.ports import Fenced  # noqa: E402

pytestmark = pytest.mark.drill


def world_in(cluster):
    "A world in a namespace of its own, as the engine's user"
    space, nurse = cluster.namespace()
    cluster.must("POST", f"/apis/gateway.networking.k8s.io/v1/namespaces/{space}/httproutes", ROUTE)
    return ClusterWorld(moved(cluster.engine, space), nurse)


@pytest.fixture
def world(cluster):
    made = world_in(cluster)
    yield made
    made.nurse.stop()


@pytest.mark.parametrize("name", api_contract.CHECKS)
def test_contract_of_api_servers(cluster, name):
    api_contract.CHECKS[name](moved(cluster.admin, cluster.namespace(nurse=False)[0]))


@pytest.mark.parametrize("name", contract.CHECKS)
def test_contract_of_targets(world, name):
    contract.CHECKS[name](world)


@pytest.mark.parametrize("outcome", ["good", "errors"])
def test_a_rollout(world, outcome):
    rolled = Rolled(world, outcome, quick=False)
    rolled.engine().run()
    assert rolled.check() == {"good": "done", "errors": "rolled_back"}[outcome]


def test_an_autoscaler_keeps_what_the_rollout_needs(world):
    "The stable version, three pods strong, cannot be made smaller while the candidate may fail; the autoscaler of the cluster itself sees to it"
    rolled = Rolled(world, "good", quick=False, replicas=3)
    engine = rolled.engine()
    while rolled.store.load("toy").state != "analysing":
        engine.turn()
        rolled.clock.sleep(1)
    assert world.autoscalers()["3"] == (3, 10)
    path = f"/apis/apps/v1/namespaces/models/deployments/{world.target._deployment(contract.OLD)}"
    found = world.send("GET", path, {}, None)[2]
    assert world.send("PUT", path, {}, {**found, "spec": {**found["spec"], "replicas": 1}})[0] == 200
    world.until(lambda: world.send("GET", path, {}, None)[2]["spec"]["replicas"] == 3, 60)
    engine.run()
    assert rolled.check() == "done"


def test_the_rights_of_the_role_end_at_the_namespace(cluster, world):
    world.target.revisions()
    for space, kind in (("default", "deployments"), ("kube-system", "pods")):
        with pytest.raises(MlopsError, match="403"):
            Api(cluster.engine, space).list(kind, {"a": "b"})


LONG = [pytest.param(s, marks=pytest.mark.soak) for s in ("pending", "preparing", "smoking", "settling", "baking", "promoting", "retiring")]


@pytest.mark.parametrize("state", ["setting", "analysing", "rolling_back", "pausing", "paused", *LONG])
def test_api_server_and_etcd_killed_in_each_state(cluster, world, state):
    "Both are taken away while the rollout is in a state, and come back on the same data; the engine waits, notes the trouble, and goes on"
    rolled = Rolled(world, "errors" if state == "rolling_back" else "good", quick=False)
    engine = rolled.engine()
    while (now := rolled.store.load("toy").state) != state:
        if state.startswith("paus") and now == "analysing":
            rolled.store.wish("toy", "pause", "ada")
        engine.turn()
        rolled.clock.sleep(1)
    if state == "paused":
        rolled.store.wish("toy", "resume", "ada")                  # what is wished is to be done without an API server
    for process in (cluster.api, cluster.etcd):
        process.kill(signal.SIGKILL)
    world.target.api.patience = 0.3
    try:
        for _ in range(3):
            engine.turn()
    finally:
        for process in (cluster.etcd, cluster.api):
            process.run()
        cluster.until_ready()
        world.target.api.patience = 20
    if engine.run().state == "paused":
        assert state == "pausing" and world.until(world.target.routed).weights == {"3": 50, "4": 50}
        rolled.store.wish("toy", "resume", "ada")
        rolled.engine().run()
    assert rolled.check() == ("rolled_back" if state == "rolling_back" else "done")


def test_two_engines_and_a_route_changed_by_hand(world):
    "One engine works, the other is refused; weights that somebody changed meanwhile are put right, and the rollout ends"
    rolled = Rolled(world, "good", quick=False)
    one, two, alone = rolled.engine(), rolled.engine(), 0
    while rolled.store.load("toy").state != "analysing":
        one.turn()
        rolled.clock.sleep(1)
    route = world.route()
    route["spec"]["rules"][-1]["backendRefs"] = [{**r, "weight": w} for r, w in zip(route["spec"]["rules"][-1]["backendRefs"], (1, 99))]
    assert world.send("PUT", f"{ROUTES}/toy", {}, route)[0] == 200
    for engine in (one, two, one):
        try:
            engine.turn()
        except Fenced:
            alone += 1
    assert alone == 1
    assert world.until(world.target.routed).weights == {"3": 50, "4": 50}
    one.run()
    assert rolled.check() == "done"


@pytest.mark.parametrize("when, how", [("preparing", "waiting"), ("preparing", "failed"), ("analysing", "waiting"), ("analysing", "failed")])
def test_a_version_never_ready_or_ready_then_dead(world, when, how):
    rolled = Rolled(world, "good", quick=False, prepare=5, unready=3)
    engine = rolled.engine()
    while rolled.store.load("toy").state != when:
        engine.turn()
        rolled.clock.sleep(1)
    world.break_("4", how)
    if when == "analysing":
        world.until(lambda: world.target.ready(contract.NEW).state == how)        # as quick as a rollout is here, it could be over before the controllers have noticed
    engine.run()
    assert rolled.check() == "rolled_back"
