"Targets in the three layers, as the contract and the fault tests want them."
import copy
import time

from contract import NEW, OLD
from fake_cluster import ROUTE, nursed
from waiting import until

from mlops_nb.rollout.cluster import Api
from mlops_nb.rollout.kubernetes import KubernetesTarget
from mlops_nb.rollout.manifests import Kubernetes, object_name
from mlops_nb.rollout.memory import MemoryTarget

ROUTES = "/apis/gateway.networking.k8s.io/v1/namespaces/models/httproutes"
SETTINGS = Kubernetes(image="example/toy:{version}", namespace="models", propagation=0, idle=0, steady=0, autoscale={"min": 1})


class MemoryWorld:
    "In memory"

    def __init__(self):
        self.target = MemoryTarget()

    def break_(self, version, how):
        self.target.broken[version] = how

    def replicas(self, version):
        return self.target.running[version][1]

    until = staticmethod(until)


class ClusterWorld:
    "On an API server, small or real; `wrap` may put faults around its calls"

    def __init__(self, send, nurse, wrap=lambda send: send, settings=SETTINGS, clock=time.time, **options):
        self.send, self.nurse = send, nurse
        self.target = KubernetesTarget(settings, "toy", Api(wrap(send), settings.namespace, **options), example=lambda r: {}, ask=self.ask, fetch=lambda url: b"server_requests_in_flight 0\n", clock=clock)

    def ask(self, url, headers, body):
        "What a version answers to the smoke test"
        return (500, "wrong") if self.nurse.broken.get(headers["x-model-version"]) == "wrong" else (200, "{}")

    def break_(self, version, how):
        self.nurse.broken[version] = how
        for act in getattr(self.cluster, "after", []) if hasattr(self, "cluster") else []:
            act()
            self.cluster.settle()

    def replicas(self, version):
        "Pods of a version that are there"
        pods = self.send("GET", "/api/v1/namespaces/models/pods", {"labelSelector": f"mlops-nb/model=toy,mlops-nb/version={version}"}, None)[2]["items"]
        return len([p for p in pods if not p["metadata"].get("deletionTimestamp")])

    def route(self):
        return self.send("GET", f"{ROUTES}/toy", {}, None)[2]

    def autoscalers(self):
        "Version -> the least and the most pods that its autoscaler may make"
        found = {r.version: self.target.api.get("horizontalpodautoscalers", object_name("toy", r)) for r in (OLD, NEW)}
        return {v: (a["spec"]["minReplicas"], a["spec"]["maxReplicas"]) for v, a in found.items() if a}

    until = staticmethod(until)


def small(route=ROUTE, **options):
    "A world on the small API server, with an HTTPRoute"
    cluster, nurse = nursed()
    cluster.send("POST", ROUTES, {}, copy.deepcopy(route))
    world = ClusterWorld(cluster.send, nurse, **options)
    world.cluster = cluster
    return world
