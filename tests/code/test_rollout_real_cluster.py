"The Kubernetes target on a real API server with etcd and controller manager, with the rights of a Role: the contracts, whole rollouts, and the API server killed in between."
import signal
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "rollout")]
import api_contract  # noqa: E402
import contract  # noqa: E402
import real_cluster  # noqa: E402
from engines import Rolled  # noqa: E402
from fake_cluster import ROUTE  # noqa: E402
from worlds import ClusterWorld  # noqa: E402

from mlops_nb.core import MlopsError  # noqa: E402
from mlops_nb.rollout.cluster import Api  # noqa: E402

pytestmark = pytest.mark.drill


@pytest.fixture(scope="module")
def cluster():
    "A running cluster; its tests are skipped by name where it was not built"
    if not real_cluster.programs():
        pytest.skip("no API server here; `tools/cluster.sh build` makes one on Debian 12 (needs golang-go, dpkg-dev, etcd-server)")
    made = real_cluster.RealCluster()
    try:
        yield made.start()
    finally:
        made.close()


def world_in(cluster):
    "A world in a namespace of its own, as the engine's user"
    space, nurse = cluster.namespace()
    cluster.must("POST", f"/apis/gateway.networking.k8s.io/v1/namespaces/{space}/httproutes", ROUTE)
    return ClusterWorld(real_cluster.moved(cluster.engine, space), nurse)


@pytest.fixture
def world(cluster):
    made = world_in(cluster)
    yield made
    made.nurse.stop()


@pytest.mark.parametrize("name", api_contract.CHECKS)
def test_contract_of_api_servers(cluster, name):
    api_contract.CHECKS[name](real_cluster.moved(cluster.admin, cluster.namespace(nurse=False)[0]))


@pytest.mark.parametrize("name", contract.CHECKS)
def test_contract_of_targets(world, name):
    contract.CHECKS[name](world)


@pytest.mark.parametrize("outcome", ["good", "errors"])
def test_a_rollout(world, outcome):
    rolled = Rolled(world, outcome, quick=False)
    rolled.engine().run()
    assert rolled.check() == {"good": "done", "errors": "rolled_back"}[outcome]


def test_the_rights_of_the_role_end_at_the_namespace(cluster, world):
    world.target.revisions()
    for space, kind in (("default", "deployments"), ("kube-system", "pods")):
        with pytest.raises(MlopsError, match="403"):
            Api(cluster.engine, space).list(kind, {"a": "b"})


def test_the_api_server_killed_in_the_middle(cluster, world):
    rolled = Rolled(world, "good", quick=False)
    engine = rolled.engine()
    while rolled.store.load("toy").state != "analysing":
        engine.turn()
    cluster.api.kill(signal.SIGKILL)
    world.target.api.patience = 0.5
    engine.turn()
    assert "Unavailable" in rolled.store.load("toy").reason
    cluster.api.run()
    cluster.until_ready()
    world.target.api.patience = 8
    engine.run()
    assert rolled.check() == "done"
