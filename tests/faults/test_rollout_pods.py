"""Rollouts under load on a real API server, a true Deployment controller and a real Envoy, with a real `mlops-nb serve` for every pod: no request fails in any strategy, a sabotaged version is
taken back, and the orders of things that do lose requests are seen to lose them here too."""
import copy
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OneHotEncoder

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "rollout")]
import real_cluster  # noqa: E402
from fake_cluster import ROUTE, until  # noqa: E402
from parts import Load  # noqa: E402
from pods import Town, loopback  # noqa: E402

from mlops_nb.packaging import package  # noqa: E402
from mlops_nb.rollout.cluster import Api  # noqa: E402
from mlops_nb.rollout.engine import Engine, begin  # noqa: E402
from mlops_nb.rollout.kubernetes import Kubernetes, KubernetesTarget, begin as first, measurements, pod_template  # noqa: E402
from mlops_nb.rollout.memory import MemoryPointer, MemoryStore  # noqa: E402
from mlops_nb.rollout.ports import Revision, Routes  # noqa: E402
from mlops_nb.rollout.run import WallClock, gate  # noqa: E402
from mlops_nb.rollout.scrape import fetch  # noqa: E402
from mlops_nb.rollout.strategies import make_spec  # noqa: E402

pytestmark = pytest.mark.drill
SABOTAGED = [sys.executable, "-c", """
import itertools, random
from mlops_nb.serving.models import Model
inner, calls = Model.answer, itertools.count()
def answer(self, rows):
    if next(calls) > 5 and random.random() < .3: raise RuntimeError("sabotaged")
    return inner(self, rows)
Model.answer = answer
from mlops_nb.cli import main; main()"""]
QUICK = {"interval": 0.5, "bake": 2, "drain": 1, "deadline": 90, "prepare": 60, "settle": 30, "min_requests": 100, "policy": {"margin": 0.05, "slow_margin": 0.25}}
BODY = b'{"rows": [{"fare": 1.0, "town": "Ulm"}]}'


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


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    "A small model, compiled"
    rng = np.random.default_rng(0)
    x = pd.DataFrame({"fare": rng.normal(size=200), "town": rng.choice(["Ulm", "Cork"], 200)})
    steps = ColumnTransformer([("town", OneHotEncoder(handle_unknown="ignore"), ["town"]), ("fare", "passthrough", ["fare"])])
    model = Pipeline([("prepare", steps), ("model", LogisticRegression())]).fit(x, x.fare + rng.normal(0, 0.3, 200) > 0)
    return package(model, tmp_path_factory.mktemp("bundles") / "boarding", name="toy", sample=x, metadata={}).path


class World:
    "Version 3 with all traffic in a namespace of its own, ready to be rolled over"

    def __init__(self, cluster, bundle, folder, replicas=1, linger=2, **commands):
        self.town, self.replicas = Town(cluster, folder / "town", copy.deepcopy(ROUTE), {v.removeprefix("v"): c for v, c in commands.items()}), replicas
        self.old, self.new = Revision("3", str(bundle), "aa11bb22cc"), Revision("4", str(bundle), "dd33ee44ff")
        self.send = real_cluster.moved(cluster.engine, self.town.space)
        settings = Kubernetes(image="example/toy:{version}", namespace="models", linger=linger, grace=15, steady=1, propagation=0.5, idle=1, gateway=f"http://127.0.0.1:{self.town.gate.port}", host="toy.example")
        template = pod_template("toy", Revision("{version}", "{model}"), settings)
        template["spec"]["containers"][0]["env"] = [{"name": "MODEL_VERSION", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['mlops-nb/version']"}}}]
        (folder / "pod.yaml").write_text(yaml.safe_dump({"spec": {"template": template}}))
        self.target = KubernetesTarget(settings.model_copy(update={"template": "pod.yaml"}), "toy", Api(self.send, "models"), folder, example=lambda r: {"fare": 1.0, "town": "Ulm"}, fetch=lambda url: fetch(loopback(url)))
        self.store, self.pointer = MemoryStore(), MemoryPointer("3")

    def __enter__(self):
        self.town.__enter__()
        assert first(self.target, self.old, self.replicas, 120).weights == {"3": 100}
        return self

    def __exit__(self, *_):
        self.town.__exit__()
        assert self.town.kubelet.trouble is None and self.town.gate.trouble is None

    def load(self, rate=80):
        return Load(self.town.gate.port, clients=6, rate=rate, headers={"host": "toy.example"}, body=BODY)

    def roll(self, strategy, **spec):
        "A whole rollout under load"
        begin(self.store, WallClock(), "toy", make_spec(strategy=strategy, replicas=self.replicas, **{**QUICK, **spec}), self.old, self.new, "ada")
        engine = Engine("toy", self.target, self.store, WallClock(), measurements(self.target), self.pointer, gate, owner="engine")
        with self.load() as load:
            until(lambda: load.seen)
            record = engine.run()
            seen, before = load.total, dict(load.seen)
            until(lambda: load.total > seen + 50)
        return record, load, {v: n - before.get(v, 0) for v, n in load.seen.items()}

    def deployment(self, name, change):
        "Change a Deployment as a person would"
        Api(self.send, "models").change("deployments", name, lambda found: change(copy.deepcopy(found)))


def ended(world, version):
    "Only one version is left: its pods, its processes, its weight"
    assert [r.version for r in world.target.revisions()] == [version] and {v: w for v, w in until(world.target.routed).weights.items() if w} == {version: 100}
    until(lambda: len(world.town.kubelet.pods) == world.replicas)


@pytest.mark.parametrize("strategy, replicas, more", [("canary", 1, {"steps": [25, 100]}), ("blue_green", 1, {}), ("rolling", 2, {}), ("shadow", 1, {})])
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
        assert after.get("4", 0) == 0 and 0 < len(load.failed) < 60
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
    "One of two pods is killed outright: what it held is lost, the rest goes on with the other once two probes have failed"
    with World(cluster, bundle, tmp_path, replicas=2) as world, world.load() as load:
        until(lambda: load.seen)
        victim = next(iter(world.town.kubelet.pods.values()))
        victim.process.kill()
        until(lambda: victim.restarts == 1 and victim.ready)
        until(lambda: world.target.ready(world.old).state == "ready")
        lost, seen = len(load.failed), load.total
        until(lambda: load.total > seen + 100)
        assert len(load.failed) == lost < 60
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
        record, load, _ = world.roll("canary", steps=[50, 100])
        thread.join()
        assert record.state == "done", record.reason
        assert not load.failed, load.failed[:5]
        ended(world, "4")
