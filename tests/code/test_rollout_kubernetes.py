"The Kubernetes target: its contract in memory and on the small API server, and the official client over HTTP."
import json
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "rollout"))
import api_contract  # noqa: E402
import contract  # noqa: E402
from fake_cluster import FakeCluster, Served  # noqa: E402
from worlds import SETTINGS, ClusterWorld, MemoryWorld, small  # noqa: E402

from mlops_nb.core import MlopsError  # noqa: E402
from mlops_nb.rollout.cluster import Api, connect  # noqa: E402
from mlops_nb.rollout.kubernetes import begin, measurements  # noqa: E402
from mlops_nb.rollout.ports import Readiness, Revision, Routes, Unavailable  # noqa: E402
from mlops_nb.rollout.scrape import Pods, Prometheus  # noqa: E402
from mlops_nb.rollout.strategies import make_spec  # noqa: E402

WORLDS = {"memory": MemoryWorld, "small": small}


@pytest.mark.parametrize("layer", WORLDS)
@pytest.mark.parametrize("name", contract.CHECKS)
def test_contract_of_targets(layer, name):
    contract.CHECKS[name](WORLDS[layer]())


@pytest.mark.parametrize("name", api_contract.CHECKS)
def test_contract_of_api_servers(name):
    api_contract.CHECKS[name](FakeCluster().send)


@pytest.fixture
def served(tmp_path):
    "The small API server over HTTP, and a world that uses the official client"
    world = small()
    made = Served(world.cluster, tmp_path)
    made.world = ClusterWorld(connect(str(made.kubeconfig), timeout=5), world.nurse, sleep=lambda s: None)
    made.world.cluster = world.cluster
    yield made
    made.close()


def test_the_official_client_does_all_of_it(served):
    contract.check_drained_and_removed(served.world)
    assert {method for method, _, _ in served.seen} == {"GET", "POST", "PUT", "DELETE"}
    assert {token for _, _, token in served.seen} == {"Bearer secret-token"}


def test_the_role_in_deploy_grants_what_is_asked_and_no_more(served, root):
    contract.check_replicas_change(served.world)
    contract.check_drained_and_removed(served.world)
    verbs = {"POST": "create", "PUT": "update", "DELETE": "delete"}
    asked = {(path.split("/models/")[1].split("/")[0], verbs.get(m) or ("get" if path.count("/") > (5 if path.startswith("/api/") else 6) else "list")) for m, path, _ in served.seen}
    role = next(d for d in yaml.safe_load_all((root / "deploy/rollout/rbac.yaml").read_text()) if d["kind"] == "Role")
    granted = {(kind, verb) for rule in role["rules"] for kind in rule["resources"] for verb in rule["verbs"]}
    assert asked == granted, "the Role in deploy/ grants more or less than the target asks for"


@pytest.mark.parametrize("odd", ["close", "lose", (500, {}, {}), (503, {}, {"message": "starting"}), (429, {"Retry-After": "0"}, {}), (410, {}, {"reason": "Gone"}), (504, {}, {})])
def test_answers_that_are_odd_once(served, odd):
    "Every second call is answered oddly, or carried out and the answer lost"
    count = iter(range(10_000))
    served.odd = lambda method, path: odd if next(count) % 2 else None
    contract.check_drained_and_removed(served.world)


def test_an_api_server_that_stays_away(served):
    target = contract.started(served.world)
    served.odd, served.world.target.api.patience = lambda method, path: "close", 0.2
    for call in (target.routed, target.revisions, lambda: target.ensure(contract.OLD, 1, 1), lambda: target.route(Routes({"4": 100}, fence=1)), lambda: target.remove(contract.NEW, 1)):
        with pytest.raises(Unavailable):
            call()
    served.odd, served.world.target.api.patience = None, 8
    assert Routes({"3": 100}).same(target.routed())


def test_what_is_forbidden_names_the_right(served):
    served.odd = lambda method, path: (403, {}, {"message": "no"}) if method == "PUT" else None
    with pytest.raises(MlopsError, match="cannot update httproutes/toy.*403.*\n.*Role needs 'update' on 'httproutes'"):
        served.world.target.ensure(contract.OLD, 1, 1)


def test_smoke_through_the_gateway_or_the_service():
    world, asked = small(), []
    contract.started(world)
    world.target.ask = lambda url, headers, body: asked.append((url, headers.get("x-model-version"), body)) or (200, "")
    assert world.target.smoke(contract.NEW) == Readiness("ready")
    assert asked == [("http://toy-m-4-dd33ee44.models:8080/predict", "4", b'{"rows": [{}]}')]
    for status, state in ((0, "waiting"), (503, "waiting"), (500, "failed"), (422, "failed")):
        world.target.ask = lambda *_, status=status: (status, "text")
        assert world.target.smoke(contract.NEW).state == state
    rules = world.route()["spec"]["rules"]
    assert [r["matches"][0]["headers"][0]["value"] for r in rules[:-1]] == ["3", "4"] and rules[-1]["timeouts"] == {"request": "30s"}


def test_selectors_are_never_written_twice():
    world, services = small(), []
    inner = world.target.api.send
    world.target.api.send = lambda method, path, query, body: (services.append(method) if "/services" in path and method != "GET" else None) or inner(method, path, query, body)
    target = contract.started(world)
    for weights in ({"3": 50, "4": 50}, {"4": 100}, {"3": 100}):
        target.route(Routes(weights, fence=1))
    world.until(lambda: target.remove(contract.NEW, 1) or target.revisions() == [contract.OLD])
    assert services == ["POST", "POST", "DELETE"]


def test_weights_are_not_live_before_the_gateway_says_so_and_a_little_later():
    now = [1000.0]
    world = small(settings=SETTINGS.model_copy(update={"propagation": 10, "idle": 30}), clock=lambda: now[0])
    target = world.target
    for r in (contract.OLD, contract.NEW):
        target.ensure(r, 1, 1)
    world.nurse.gateway = False
    target.route(Routes({"3": 100}, fence=1))
    now[0] += 100
    assert target.routed() is None and not target.drained(contract.NEW)
    world.nurse.gateway = True
    world.cluster.settle()
    assert target.routed().weights == {"3": 100}
    target.route(Routes({"3": 90, "4": 10}, fence=1))
    now[0] += 9
    assert target.routed() is None
    now[0] += 2
    assert target.routed().weights == {"3": 90, "4": 10}
    target.route(Routes({"3": 100}, fence=1))
    for wait, over in ((29, False), (2, True)):
        now[0] += wait
        assert target.drained(contract.NEW) is over
    target.fetch = lambda url: b"server_requests_in_flight 2.0\n"
    assert not target.drained(contract.NEW)
    now[0] -= 3600                                                   # a clock that is set back stops nothing
    assert target.routed().weights == {"3": 100}


def test_a_reference_that_is_not_resolved_is_not_live():
    world = small()
    target = contract.started(world)
    target.route(Routes({"3": 90, "4": 10}, fence=1))
    world.send("DELETE", "/api/v1/namespaces/models/services/toy-m-4-dd33ee44", {}, None)
    world.cluster.settle()
    assert target.routed() is None
    target.route(Routes({"3": 100}, fence=1))
    assert world.until(target.routed).weights.get("3") == 100


def test_objects_that_others_made_are_found_by_their_labels():
    world = small()
    labels = {"mlops-nb/model": "toy", "mlops-nb/version": "3", "app.kubernetes.io/name": "mlops-nb"}
    from mlops_nb.rollout.manifests import deployment, service
    for path, made in (("/apis/apps/v1/namespaces/models/deployments", deployment("toy", Revision("3"), 2, 0, SETTINGS)), ("/api/v1/namespaces/models/services", service("toy", Revision("3"), SETTINGS))):
        world.send("POST", path, {}, {**made, "metadata": {"name": "by-hand", "labels": labels}})
    assert world.target.revisions() == [Revision("3")]
    assert begin(world.target, Revision("3"), 2, 10).weights == {"3": 100}
    assert world.target.ready(Revision("3")).state == "ready" and world.replicas("3") == 2
    assert world.route()["spec"]["rules"][-1]["backendRefs"] == [{"name": "by-hand", "port": 8080, "weight": 100}]


def test_the_first_version_and_one_that_does_not_start():
    world = small()
    assert begin(world.target, contract.OLD).weights == {"3": 100}
    assert begin(world.target, contract.NEW).weights == {"3": 100}            # there is a division already
    world = small()
    world.break_("3", "failed")
    with pytest.raises(MlopsError, match="version 3 is not ready: .*CrashLoopBackOff"):
        begin(world.target, contract.OLD)


def test_what_gateway_api_cannot_do_is_refused_before_it_begins():
    target = small().target
    assert "sticky" in target.refuses(make_spec(strategy="ab")) and "sticky" in target.refuses(make_spec(sticky="x-user-id"))
    assert not target.refuses(make_spec(strategy="canary"))


def test_measurements_from_either_source():
    world = small()
    contract.started(world)
    assert isinstance(measurements(world.target).source, Pods)
    texts = {}
    world.target.fetch = lambda url: texts.setdefault(url, b"model_loads_total 1\nmodel_prediction_duration_seconds_count 0\n")
    metrics = measurements(world.target)
    import time
    first = metrics.block("3", "4", time.time() - 20, time.time(), None)
    new = next(iter(world.target.pods("4").values()))
    texts[new] = b"model_loads_total 1\nmodel_prediction_duration_seconds_count 40\nmodel_prediction_errors_total{reason=\"500\"} 2\n"
    second = metrics.block("3", "4", first["time"], time.time(), None)
    assert (second["candidate"]["requests"], second["candidate"]["errors"], second["stable"]["requests"]) == (42, 2, 0)
    settings = SETTINGS.model_copy(update={"metrics": "prometheus", "prometheus": "http://127.0.0.1:1"})
    world = small(settings=settings)
    contract.started(world)
    source = measurements(world.target).source
    assert isinstance(source, Prometheus) and source.pods("4") == "toy-m-4-dd33ee44-[a-z0-9]+-[a-z0-9]+"
    with pytest.raises(Unavailable):
        measurements(world.target).block("3", "4", 0, 1000, None)


def test_a_cluster_that_cannot_be_reached(tmp_path):
    from fake_cluster import kubeconfig
    (tmp_path / "config").write_text(json.dumps(kubeconfig("http://127.0.0.1:1", "x")))
    with pytest.raises(Unavailable, match="no answer"):
        Api(connect(str(tmp_path / "config")), "models", patience=0.3).get("pods", "x")
