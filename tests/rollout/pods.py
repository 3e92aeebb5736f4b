"""What a cluster's nodes and gateway do, on loopback: `Kubelet` runs a real server process for every pod that the real API server knows, `Gate` feeds a real Envoy from HTTPRoute and
EndpointSlices. The API server takes no loopback address for a pod, so a pod has 10.x.y.z there and listens on 127.x.y.z."""
import copy
import http.client
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import real_cluster
import servers
import yaml
from fake_cluster import ROUTE
from parts import Load
from waiting import until

from mlops_nb.packaging import package
from mlops_nb.rollout.cluster import Api
from mlops_nb.rollout.engine import Engine, begin
from mlops_nb.rollout.envoy import ask_admin, write_resources
from mlops_nb.rollout.kubernetes import KubernetesTarget, measurements
from mlops_nb.rollout.kubernetes import begin as first
from mlops_nb.rollout.manifests import Kubernetes, pod_template
from mlops_nb.rollout.memory import MemoryPointer, MemoryStore
from mlops_nb.rollout.ports import Revision
from mlops_nb.rollout.run import WallClock, gate
from mlops_nb.rollout.scrape import fetch
from mlops_nb.rollout.strategies import make_spec

OURS = [sys.executable, "-c", "from mlops_nb.cli import main; main()"]
NOW = "2026-01-01T00:00:00Z"
SABOTAGED = [sys.executable, "-c", """
import itertools, random
from mlops_nb.serving.models import Model
inner, calls = Model.answer, itertools.count()
def answer(self, rows):
    if next(calls) > 5 and random.random() < .3: raise RuntimeError("sabotaged")
    return inner(self, rows)
Model.answer = answer
from mlops_nb.cli import main; main()"""]
QUICK = {"interval": 0.5, "bake": 2, "drain": 1, "deadline": 90, "prepare": 60, "settle": 30, "min_requests": 100, "policy": {"margin": 0.1, "slow_margin": 0.4}}
BODY = b'{"rows": [{"fare": 1.0, "town": "Ulm"}]}'


def loopback(text):
    "An address of the cluster as it is on this machine"
    return text.replace("10.", "127.", 1) if text.startswith("10.") else text.replace("//10.", "//127.")


class Shift:
    "Something that looks again and again in a thread; the API server may be away meanwhile"

    def __init__(self, send, space, pause=0.05):
        self.send, self.space, self.pause, self.over, self.trouble = send, space, pause, threading.Event(), None
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self):
        while not self.over.wait(self.pause):
            try:
                self.look()
            except OSError:
                time.sleep(0.2)
            except Exception as e:
                self.trouble = e
                raise

    def items(self, group, kind):
        status, _, found = self.send("GET", f"/{group}/namespaces/{self.space}/{kind}", {}, None)
        if status != 200:
            raise OSError(f"{kind}: {status}")
        return found["items"]

    def stop(self):
        self.over.set()
        if self.thread.is_alive():
            self.thread.join(180)


class Pod:
    "One pod's process on an address of its own: started, probed, started again when it ends, told to end, killed when its grace is over"

    def __init__(self, found, address, folder, command):
        self.name, self.address, self.folder, self.restarts = found["metadata"]["name"], address, folder, 0
        container = found["spec"]["containers"][0]
        labels, port = found["metadata"]["labels"], container["ports"][0]["containerPort"]
        place = lambda e: labels[e["valueFrom"]["fieldRef"]["fieldPath"].split("'")[1]] if "valueFrom" in e else e["value"]
        self.env = {**os.environ, **{e["name"]: place(e) for e in container.get("env") or []}}
        self.line = [*command, *(loopback(address) if a == "0.0.0.0" else a for a in container["args"])]
        self.port, self.path, self.grace = port, container["readinessProbe"]["httpGet"]["path"], found["spec"]["terminationGracePeriodSeconds"]
        self.told, self.misses, self.ready, self.process = None, 0, False, None
        folder.mkdir(parents=True)
        self.start()

    def start(self):
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self.line, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def probe(self):
        "Ready after one answer, not ready after two without"
        connection = http.client.HTTPConnection(loopback(self.address), self.port, timeout=2)
        try:
            connection.request("GET", self.path)
            good = connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            good = False
        finally:
            connection.close()
        self.misses = 0 if good else self.misses + 1
        self.ready = good or self.ready and self.misses < 2

    def look(self):
        "Probe it, or start it again"
        if self.process.poll() is None:
            return self.probe()
        self.ready, self.restarts = False, self.restarts + 1
        self.start()

    def ended(self):
        "Tell it to end; whether it has"
        if self.told is None:
            self.told = time.monotonic()
            self.process.send_signal(signal.SIGTERM)
        if self.process.poll() is None and time.monotonic() - self.told > self.grace:
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.poll() is not None

    def status(self):
        "What the API server is told"
        state = {"running": {"startedAt": NOW}} if self.process.poll() is None and self.restarts < 4 else {"waiting": {"reason": "CrashLoopBackOff"}}
        word = lambda kind: str(self.ready or kind in ("PodScheduled", "Initialized"))
        return {"phase": "Running", "podIP": self.address, "podIPs": [{"ip": self.address}], "hostIP": "10.98.0.1", "startTime": NOW,
                "containerStatuses": [{"name": "server", "image": "x", "imageID": "x", "ready": self.ready, "restartCount": self.restarts, "state": state, "lastState": {}}],
                "conditions": [{"type": k, "status": word(k), "lastTransitionTime": NOW} for k in ("PodScheduled", "Initialized", "ContainersReady", "Ready")]}


class Kubelet(Shift):
    "Scheduler and kubelet of a namespace; `commands` says what runs a version's container: version -> command line before the container's arguments"

    def __init__(self, send, space, folder, commands=None):
        super().__init__(send, space)
        self.folder, self.commands, self.pods, self.count, self.most = folder, commands or {}, {}, itertools.count(1), 0
        self.thread.start()

    def look(self):
        seen = self.items("api/v1", "pods")
        for found in seen:
            self.see(found, f"/api/v1/namespaces/{self.space}/pods/{found['metadata']['name']}")
        for uid in self.pods.keys() - {p["metadata"]["uid"] for p in seen}:
            if self.pods[uid].ended():
                self.pods.pop(uid)
        self.most = max(self.most, len(self.pods))

    def see(self, found, path):
        uid, name = found["metadata"]["uid"], found["metadata"]["name"]
        pod = self.pods.get(uid)
        if found["metadata"].get("deletionTimestamp"):
            if pod is None or pod.ended():
                self.send("DELETE", path, {}, {"gracePeriodSeconds": 0})
        elif not found["spec"].get("nodeName"):
            self.send("POST", f"{path}/binding", {}, {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": {"apiVersion": "v1", "kind": "Node", "name": "fake"}})
        elif pod is None:
            command = self.commands.get(found["metadata"]["labels"]["mlops-nb/version"], OURS)
            self.pods[uid] = Pod(found, "10.99.{}.{}".format(*divmod(next(self.count), 250)), self.folder / name, command)
        else:
            pod.look()
            if {k: v for k, v in (found.get("status") or {}).items() if k in ("podIP", "containerStatuses", "conditions")} != {k: pod.status()[k] for k in ("podIP", "containerStatuses", "conditions")}:
                self.send("PUT", f"{path}/status", {}, {**found, "status": {**(found.get("status") or {}), **pod.status()}})

    def stop(self):
        super().stop()
        for pod in self.pods.values():
            if pod.process.poll() is None:
                os.killpg(pod.process.pid, signal.SIGKILL)
                pod.process.wait(180)


def _typed(kind, **fields):
    return {"@type": f"type.googleapis.com/{kind}", **fields}


def _address(host, port):
    return {"socket_address": {"address": host, "port_value": port}}


class Gate(Shift):
    "A gateway for the HTTPRoutes of a namespace: no retries and no health checks of its own, so that whatever the order of things loses is seen"

    def __init__(self, send, space, folder):
        super().__init__(send, space)
        self.folder, self.port, self.admin, self.version, self.last = folder, servers.free_port(), servers.free_port(), itertools.count(1), {}
        folder.mkdir(parents=True)
        for kind in ("clusters", "routes"):
            self.write(kind, [])
        watched = self.watched = lambda kind: {"resource_api_version": "V3", "path_config_source": {"path": str(folder / f"{kind}.json"), "watched_directory": {"path": str(folder)}}}
        router = {"name": "envoy.filters.http.router", "typed_config": _typed("envoy.extensions.filters.http.router.v3.Router")}
        manager = _typed("envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager", stat_prefix="gate", http_filters=[router],
                         rds={"route_config_name": "gate", "config_source": watched("routes")})
        listener = {"name": "gate", "address": _address("127.0.0.1", self.port), "filter_chains": [{"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}]}
        (folder / "envoy.json").write_text(json.dumps({"node": {"id": "gate", "cluster": "gate"}, "admin": {"address": _address("127.0.0.1", self.admin)},
                                                       "dynamic_resources": {"cds_config": watched("clusters")}, "static_resources": {"listeners": [listener]}}))
        self.envoy = real_cluster.Process(folder / "process", [Path(sys.executable).with_name("envoy"), "-c", folder / "envoy.json", "--disable-hot-restart", "--concurrency", "1", "-l", "warning"])
        self.envoy.run()
        self.thread.start()

    def write(self, kind, resources):
        "A file for Envoy, if it would say something new"
        if self.last.get(kind) != resources:
            self.last[kind] = resources
            write_resources(self.folder / f"{kind}.json", resources, str(next(self.version)))

    def look(self):
        "Clusters before the routes that name them; the HTTPRoute is accepted as soon as the files are written, Envoy reads them when it does"
        routes, names = self.items("apis/gateway.networking.k8s.io/v1", "httproutes"), {s["metadata"]["name"] for s in self.items("api/v1", "services")}
        slices = self.items("apis/discovery.k8s.io/v1beta1", "endpointslices")
        for name in names:
            self.write(f"endpoints-{name}", [self.endpoints(name, [s for s in slices if s["metadata"]["labels"]["kubernetes.io/service-name"] == name])])
        self.write("clusters", [_typed("envoy.config.cluster.v3.Cluster", name=n, type="EDS", connect_timeout="1s", eds_cluster_config={"eds_config": self.watched(f"endpoints-{n}")}) for n in sorted(names)])
        self.write("routes", [_typed("envoy.config.route.v3.RouteConfiguration", name="gate", virtual_hosts=[self.host(r, names) for r in routes])])
        for route in routes:
            self.accept(route, names)

    def endpoints(self, name, slices):
        ready = [e for s in slices for e in s.get("endpoints") or [] if (e.get("conditions") or {}).get("ready")]
        port = next((p["port"] for s in slices for p in s.get("ports") or []), 8080)
        hosts = sorted({a for e in ready for a in e["addresses"]})
        return _typed("envoy.config.endpoint.v3.ClusterLoadAssignment", cluster_name=name, endpoints=[{"lb_endpoints": [{"endpoint": {"address": _address(loopback(a), port)}} for a in hosts]}])

    def host(self, route, names):
        return {"name": route["metadata"]["name"], "domains": route["spec"].get("hostnames") or ["*"], "routes": [r for rule in route["spec"].get("rules") or [] for r in self.rule(rule, names)]}

    def rule(self, rule, names):
        "An Envoy route for each match; a backend that is not there gets its share of 500s, as the Gateway API says"
        refs = [(r["name"], r.get("weight", 1)) for r in rule.get("backendRefs") or [] if r.get("weight", 1)]
        action = {"route": {"timeout": rule.get("timeouts", {}).get("request", "30s"), "weighted_clusters": {"clusters": [{"name": n, "weight": w} for n, w in refs]}}}
        if copies := [f["requestMirror"] for f in rule.get("filters") or [] if f["type"] == "RequestMirror"]:
            action["route"]["request_mirror_policies"] = [{"cluster": c["backendRef"]["name"], "runtime_fraction": {"default_value": {"numerator": c.get("percent", 100)}}} for c in copies]
        if not refs or any(n not in names for n, _ in refs):
            action = {"direct_response": {"status": 500}}
        header = lambda h: {"name": h["name"], "string_match": {"exact": h["value"]}}
        return [{"match": {"prefix": m.get("path", {}).get("value", "/"), "headers": [header(h) for h in m.get("headers") or []]}, **action} for m in rule.get("matches") or [{}]]

    def accept(self, route, names):
        "Write the status of an HTTPRoute"
        lacking = any(r["name"] not in names for rule in route["spec"].get("rules") or [] for r in rule.get("backendRefs") or [])
        said = {"Accepted": "True", "ResolvedRefs": "False" if lacking else "True"}
        told = [{"type": k, "status": v, "reason": k, "message": "seen", "observedGeneration": route["metadata"]["generation"], "lastTransitionTime": NOW} for k, v in said.items()]
        status = {"parents": [{"parentRef": p, "controllerName": "example.com/gate", "conditions": told} for p in route["spec"].get("parentRefs") or []]}
        if route.get("status") != status:
            self.send("PUT", f"/apis/gateway.networking.k8s.io/v1/namespaces/{self.space}/httproutes/{route['metadata']['name']}/status", {}, {**route, "status": status})

    def retried(self):
        "Requests that Envoy sent again; none, since it may not"
        return sum(int(line.split(": ")[1]) for line in ask_admin(self.admin, "/stats?filter=upstream_rq_retry$").splitlines() if ": " in line)

    def stop(self):
        super().stop()
        self.envoy.kill(signal.SIGKILL)


class Town:
    "A namespace with its kubelet and its gateway; a context manager"

    def __init__(self, cluster, folder, route, commands=None):
        self.cluster, self.folder = cluster, Path(folder)
        self.space, _ = cluster.namespace(nurse=False)
        cluster.must("POST", f"/apis/gateway.networking.k8s.io/v1/namespaces/{self.space}/httproutes", route)
        self.kubelet, self.gate = Kubelet(cluster.admin, self.space, self.folder / "pods", commands), Gate(cluster.admin, self.space, self.folder / "gate")

    def __enter__(self):
        until(lambda: _open(self.gate.port))
        return self

    def __exit__(self, *_):
        self.gate.stop()
        self.kubelet.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def _open(port):
    "Whether somebody listens on a port of loopback"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.connect()
        return True
    except OSError:
        return False
    finally:
        connection.close()


def make_bundle(folder):
    "A small model, compiled"
    import numpy as np
    import pandas as pd
    from sklearn.compose import ColumnTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import OneHotEncoder
    rng = np.random.default_rng(0)
    x = pd.DataFrame({"fare": rng.normal(size=200), "town": rng.choice(["Ulm", "Cork"], 200)})
    steps = ColumnTransformer([("town", OneHotEncoder(handle_unknown="ignore"), ["town"]), ("fare", "passthrough", ["fare"])])
    model = Pipeline([("prepare", steps), ("model", LogisticRegression())]).fit(x, x.fare + rng.normal(0, 0.3, 200) > 0)
    return package(model, folder / "boarding", name="toy", sample=x, metadata={}).path


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
