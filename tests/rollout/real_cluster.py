"A real etcd, API server and controller manager on loopback, for the drills; `Nurse` plays kubelet and gateway, and the engine has the rights of a Role and no more."
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import servers
from fake_cluster import Nurse, kubeconfig
from waiting import until

from mlops_nb.rollout.cluster import connect

ROLE = [{"apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["get", "list", "create", "update", "delete"]},
        {"apiGroups": [""], "resources": ["services"], "verbs": ["get", "list", "create", "delete"]},
        {"apiGroups": ["autoscaling"], "resources": ["horizontalpodautoscalers"], "verbs": ["get", "create", "update", "delete"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list"]},
        {"apiGroups": ["gateway.networking.k8s.io"], "resources": ["httproutes"], "verbs": ["get", "update"]}]
TEXT, NUMBER = {"type": "string"}, {"type": "integer"}


def obj(**fields):
    return {"type": "object", "properties": fields}


def array(items):
    return {"type": "array", "items": items}


MATCH = obj(path=obj(type=TEXT, value=TEXT), method=TEXT, headers=array(obj(type=TEXT, name=TEXT, value=TEXT)), queryParams=array(obj(type=TEXT, name=TEXT, value=TEXT)))
PORT = {**NUMBER, "minimum": 1, "maximum": 65535}
REF = {"group": {**TEXT, "default": "core"}, "kind": {**TEXT, "default": "Service"}, "name": {**TEXT, "minLength": 1}, "namespace": TEXT, "port": PORT}
PERCENT = {**NUMBER, "minimum": 0, "maximum": 100}
FILTER = obj(type={**TEXT, "enum": ["RequestMirror", "ResponseHeaderModifier", "RequestHeaderModifier"]}, requestMirror=obj(backendRef=obj(**REF), percent=PERCENT))
RULE = obj(name=TEXT, matches={**array(MATCH), "default": [{"path": {"type": "PathPrefix", "value": "/"}}]}, filters=array(FILTER), timeouts=obj(request=TEXT, backendRequest=TEXT),
           backendRefs=array(obj(**REF, weight={**NUMBER, "minimum": 0, "maximum": 1_000_000, "default": 1})))
PARENT = obj(group={**TEXT, "default": "gateway.networking.k8s.io"}, kind={**TEXT, "default": "Gateway"}, name=TEXT, namespace=TEXT, sectionName=TEXT, port=PORT)
CONDITION = obj(type=TEXT, status=TEXT, reason=TEXT, message=TEXT, observedGeneration=NUMBER, lastTransitionTime={**TEXT, "format": "date-time"})
SCHEMA = obj(apiVersion=TEXT, kind=TEXT, metadata={"type": "object"}, spec=obj(parentRefs=array(PARENT), hostnames=array(TEXT), rules={**array(RULE), "maxItems": 16}),
             status=obj(parents=array(obj(parentRef=PARENT, controllerName=TEXT, conditions=array(CONDITION)))))
CRD = {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
       "metadata": {"name": "httproutes.gateway.networking.k8s.io", "annotations": {"api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/gateway-api/pull/4530"}},
       "spec": {"group": "gateway.networking.k8s.io", "scope": "Namespaced", "names": {"plural": "httproutes", "singular": "httproute", "kind": "HTTPRoute", "listKind": "HTTPRouteList"},
                "versions": [{"name": "v1", "served": True, "storage": True, "subresources": {"status": {}}, "schema": {"openAPIV3Schema": SCHEMA}}]}}
CONTROLLERS = "deployment,replicaset,endpoint,endpointslice,garbagecollector,namespace,serviceaccount,podgc,horizontalpodautoscaling"


def programs():
    "Where the programs are, or None"
    script = Path(__file__).resolve().parents[2] / "tools/cluster.sh"
    found = subprocess.run([script], capture_output=True, text=True)
    return Path(found.stdout.strip()) if found.returncode == 0 and shutil.which("etcd") else None


class Process(servers.Server):
    "One program, on ports that stay"

    def __init__(self, folder, line):
        self.folder, self.line, self.process = folder, line, None
        folder.mkdir(exist_ok=True)

    def run(self):
        "Start without waiting"
        self.process = subprocess.Popen([str(p) for p in self.line], stdin=subprocess.DEVNULL, stdout=(self.folder / "log").open("ab"), stderr=subprocess.STDOUT, start_new_session=True)

    def words(self):
        return (self.folder / "log").read_text()[-2000:]


class RealCluster:
    "The three programs; namespaces with a nurse each"

    def __init__(self):
        self.folder, self.nurses, self.count = Path(tempfile.mkdtemp(prefix="cluster-")), [], 0
        self.token = {who: secrets.token_hex(16) for who in ("admin", "engine")}
        f, where, etcd, peers, self.port, cm = self.folder, programs(), *(servers.free_port() for _ in range(4))
        (f / "tokens.csv").write_text(f"{self.token['admin']},admin,admin,system:masters\n{self.token['engine']},engine,engine\n")
        subprocess.run(["openssl", "genrsa", "-out", f / "sa.key", "2048"], check=True, capture_output=True)
        subprocess.run(["openssl", "rsa", "-in", f / "sa.key", "-pubout", "-out", f / "sa.pub"], check=True, capture_output=True)
        url, peer = f"http://127.0.0.1:{etcd}", f"http://127.0.0.1:{peers}"
        self.etcd = Process(f / "etcd", ["etcd", "--data-dir", f / "data", "--listen-client-urls", url, "--advertise-client-urls", url, "--listen-peer-urls", peer,
                                         "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}", "--log-level", "error"])
        self.api = Process(f / "api", [where / "kube-apiserver", "--etcd-servers", url, "--cert-dir", f / "certs", "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", "--secure-port", self.port,
                                       "--service-cluster-ip-range=10.96.0.0/16", "--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file", f / "sa.pub",
                                       "--service-account-signing-key-file", f / "sa.key", "--token-auth-file", f / "tokens.csv", "--authorization-mode=RBAC",
                                       "--disable-admission-plugins=ServiceAccount", "--allow-privileged"])
        self.manager = Process(f / "manager", [where / "kube-controller-manager", "--kubeconfig", f / "admin", "--leader-elect=false", "--service-account-private-key-file", f / "sa.key",
                                               "--bind-address=127.0.0.1", "--secure-port", cm, "--port=0", "--cert-dir", f / "cm", f"--controllers={CONTROLLERS}", "--concurrent-deployment-syncs=2"])

    def start(self):
        self.etcd.run()
        self.api.run()
        until(lambda: (self.folder / "certs/apiserver.crt").exists() or self.api.process.poll() is not None)
        for who, token in self.token.items():
            (self.folder / who).write_text(json.dumps(kubeconfig(f"https://127.0.0.1:{self.port}", token, self.folder / "certs/apiserver.crt")))
        self.admin, self.engine = connect(str(self.folder / "admin"), timeout=10), connect(str(self.folder / "engine"), timeout=10)
        self.until_ready()
        self.manager.run()
        self.must("POST", "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "fake"}})
        self.must("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", CRD)
        until(lambda: self.admin("GET", "/apis/gateway.networking.k8s.io/v1/namespaces/default/httproutes", {}, None)[0] == 200, 200)
        return self

    def until_ready(self):
        def ready():
            assert self.api.process.poll() is None, self.api.words()
            try:
                return self.admin("GET", "/readyz", {}, None)[0] == 200
            except OSError:
                return False
        until(ready, 200)

    def must(self, method, path, body):
        status, _, found = self.admin(method, path, {}, body)
        assert status < 300, (path, status, found)
        return found

    def namespace(self, nurse=True):
        "A new namespace in which the engine has its Role; its name and its nurse"
        self.count += 1
        name = f"m{self.count}"
        self.must("POST", "/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        base = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{name}"
        self.must("POST", f"{base}/roles", {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "engine"}, "rules": ROLE})
        self.must("POST", f"{base}/rolebindings", {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": "engine"},
                  "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "engine"}, "subjects": [{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": "engine"}]})
        made = Shift(self.admin, name) if nurse else None
        if made:
            self.nurses.append(made)
        return name, made

    def close(self):
        for nurse in self.nurses:
            nurse.stop()
        for p in (self.manager, self.api, self.etcd):
            if p.process and p.process.poll() is None:
                os.killpg(p.process.pid, signal.SIGKILL)
                p.process.wait(180)
        shutil.rmtree(self.folder, ignore_errors=True)


class Shift(Nurse):
    "A nurse at work in a thread"

    def __init__(self, send, space):
        super().__init__(send, space)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self):
        while not self.over.wait(0.05):
            try:
                self.look()
            except OSError:
                time.sleep(0.2)

    def stop(self):
        self.over.set()
        self.thread.join(180)


def moved(send, space):
    "A `send` for which the namespace `models` is another one"
    return lambda method, path, query, body: send(method, path.replace("/namespaces/models/", f"/namespaces/{space}/"), query, body)
