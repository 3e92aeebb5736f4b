"""A small API server of Kubernetes: only the verbs and kinds that rollouts use, with true resource versions, conflicts, generations and status; with Deployments that
make pods. `test_cluster_contract.py` holds it to the real one. `Nurse` plays kubelet and gateway for both."""
import copy
import itertools
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PATH = re.compile(r"^/(?:api|apis/[^/]+)/v1(?:beta1)?/namespaces/([^/]+)/([a-z]+)(?:/([^/]+))?(?:/(status))?$")
KNOWN = {"deployments": "Deployment", "services": "Service", "pods": "Pod", "httproutes": "HTTPRoute", "endpointslices": "EndpointSlice",
         "horizontalpodautoscalers": "HorizontalPodAutoscaler"}
GENERATIONS = ("deployments", "httproutes")


def matches(labels, selector):
    return all((labels or {}).get(k) == v for k, v in selector.items())


class FakeCluster:
    "Objects of all namespaces; `send` is what `Api` wants"

    def __init__(self, controllers=True):
        self.objects, self.version, self.uids, self.lock, self.controllers, self.after = {}, 0, itertools.count(1), threading.RLock(), controllers, []

    def send(self, method, path, query, body):
        with self.lock:
            status, found = self.handle(method, path, query, copy.deepcopy(body))
            if method != "GET" and status < 300 and self.controllers:
                self.settle()
            return status, {}, copy.deepcopy(found)

    def error(self, status, reason, message):
        return status, {"kind": "Status", "status": "Failure", "reason": reason, "code": status, "message": message}

    def handle(self, method, path, query, body):
        found = PATH.match(urllib.parse.unquote(path))
        if not found or found[2] not in KNOWN:
            return 404, {"message": "404 page not found"}
        space, kind, name, sub = found.groups()
        key = (kind, space, name or (body or {}).get("metadata", {}).get("name"))
        old = self.objects.get(key)
        if method == "GET" and not name:
            selector = dict(p.split("=", 1) for p in query.get("labelSelector", "").split(",") if p)
            items = [o for (k, s, _), o in self.objects.items() if (k, s) == (kind, space) and matches(o["metadata"].get("labels"), selector)]
            return 200, {"kind": f"{KNOWN[kind]}List", "metadata": {"resourceVersion": str(self.version)}, "items": items}
        if method == "POST" and old:
            return self.error(409, "AlreadyExists", f'{kind} "{key[2]}" already exists')
        if method == "POST":
            return self.invalid(kind, body, None) or (201, self.create(key, body))
        if old is None:
            return self.error(404, "NotFound", f'{kind} "{name}" not found')
        if method == "GET":
            return 200, old
        if method == "DELETE":
            wanted = (body or {}).get("preconditions") or {}
            if any(old["metadata"][k] != v for k, v in wanted.items()):
                return self.error(409, "Conflict", "the precondition does not hold")
            self.objects.pop(key)
            return 200, {"kind": "Status", "status": "Success"}
        if body["metadata"].get("resourceVersion") not in (None, old["metadata"]["resourceVersion"]):
            return self.error(409, "Conflict", "the object has been modified; please apply your changes to the latest version")
        return self.invalid(kind, body, old) or (200, self.replace(key, old, body, sub))

    def invalid(self, kind, body, old):
        if kind == "httproutes" and any(not 0 <= r.get("weight", 1) <= 1_000_000 for rule in body["spec"].get("rules") or [] for r in rule.get("backendRefs") or []):
            return self.error(422, "Invalid", "weight must be between 0 and 1000000")
        if kind == "deployments" and old and body["spec"]["selector"] != old["spec"]["selector"]:
            return self.error(422, "Invalid", "spec.selector: field is immutable")
        return None

    def stamp(self, found):
        self.version += 1
        found["metadata"]["resourceVersion"] = str(self.version)
        return found

    def create(self, key, body):
        body["metadata"].update(namespace=key[1], uid=f"uid-{next(self.uids)}", creationTimestamp="2026-01-01T00:00:00Z")
        if key[0] in GENERATIONS:
            body["metadata"]["generation"] = 1
        if key[0] in ("deployments", "httproutes"):
            body.pop("status", None)
        self.objects[key] = self.stamp(body)
        return body

    def replace(self, key, old, body, sub):
        "What PUT makes of an object: its status is written by /status only, and nothing else is written there"
        new = {**old, "status": body.get("status", {})} if sub else {**body, **({"status": old["status"]} if "status" in old else {})}
        if not sub and "status" not in old:
            new.pop("status", None)
        kept = {k: old["metadata"][k] for k in ("uid", "creationTimestamp", "generation", "namespace", "resourceVersion") if k in old["metadata"]}
        new["metadata"] = {**new["metadata"], **kept}
        if new == old:
            return old
        if key[0] in GENERATIONS and new["spec"] != old["spec"]:
            new["metadata"]["generation"] += 1
        self.objects[key] = self.stamp(copy.deepcopy(new))
        return self.objects[key]

    # ----- controllers -----

    def settle(self):
        "Let the controllers act until nothing changes"
        for _ in range(50):
            before = self.version
            self.deployments()
            for act in self.after:
                act()
            self.slices()
            if self.version == before:
                return
        raise AssertionError("the controllers do not come to rest")

    def of(self, kind):
        return [(key, o) for key, o in list(self.objects.items()) if key[0] == kind]

    def deployments(self):
        alive = {o["metadata"]["uid"] for _, o in self.of("deployments")}
        for key, pod in self.of("pods"):
            if pod["metadata"]["ownerReferences"][0]["uid"] not in alive:
                self.version += 1
                self.objects.pop(key)
        for (_, space, name), found in self.of("deployments"):
            spec, uid = found["spec"], found["metadata"]["uid"]
            pods = [(k, p) for k, p in self.of("pods") if p["metadata"]["ownerReferences"][0]["uid"] == uid]
            for k, _ in pods[spec["replicas"]:]:
                self.version += 1
                self.objects.pop(k)
            for _ in range(spec["replicas"] - len(pods)):
                number = next(self.uids)
                meta = {**copy.deepcopy(spec["template"]["metadata"]), "name": f"{name}-5f7d-x{number}", "ownerReferences": [{"uid": uid}]}
                self.create(("pods", space, meta["name"]), {"metadata": meta, "spec": {**copy.deepcopy(spec["template"]["spec"]), "nodeName": "fake"}, "status": {}})
            ready = sum(is_ready(p) for _, p in pods[:spec["replicas"]])
            status = {"observedGeneration": found["metadata"]["generation"], **{k: n for k, n in
                      {"replicas": spec["replicas"], "updatedReplicas": spec["replicas"], "readyReplicas": ready, "availableReplicas": ready}.items() if n}}
            self.replace(("deployments", space, name), found, {**found, "status": status}, "status")

    def slices(self):
        for (_, space, name), found in self.of("services"):
            pods = [p for (_, s, _), p in self.of("pods") if s == space and matches(p["metadata"].get("labels"), found["spec"]["selector"]) and (p.get("status") or {}).get("podIP")]
            made = [{"addresses": [p["status"]["podIP"]], "conditions": {"ready": is_ready(p)}} for p in pods]
            key = ("endpointslices", space, f"{name}-e")
            body = {"metadata": {"name": key[2], "labels": {"kubernetes.io/service-name": name}}, "endpoints": made}
            if key in self.objects:
                self.replace(key, self.objects[key], {**body, "metadata": {**self.objects[key]["metadata"], **body["metadata"]}}, None)
            else:
                self.create(key, body)
        names = {(space, f"{name}-e") for (_, space, name), _ in self.of("services")}
        for key, _ in self.of("endpointslices"):
            if key[1:] not in names:
                self.objects.pop(key)


def is_ready(pod):
    return any(c["type"] == "Ready" and c["status"] == "True" for c in (pod.get("status") or {}).get("conditions") or [])


class Nurse:
    """Kubelet and gateway of a namespace, over `send`: pods become ready, or not, as `broken` says of their version (waiting, failed); the gateway accepts routes whose Services
    are there, while `gateway` is on. The real API server wants pods bound and ended as well."""

    def __init__(self, send, space="models", urls=None):
        self.send, self.space, self.broken, self.gateway, self.urls, self.count = send, space, {}, True, urls or {}, itertools.count(1)

    def items(self, group, kind):
        return self.send("GET", f"/{group}/namespaces/{self.space}/{kind}", {}, None)[2].get("items", [])

    def put_status(self, group, kind, found, status):
        if found.get("status") != status:
            self.send("PUT", f"/{group}/namespaces/{self.space}/{kind}/{found['metadata']['name']}/status", {}, {**found, "status": status})

    def look(self):
        "Once"
        for pod in self.items("api/v1", "pods"):
            path = f"/api/v1/namespaces/{self.space}/pods/{pod['metadata']['name']}"
            if pod["metadata"].get("deletionTimestamp"):
                self.send("DELETE", path, {}, {"gracePeriodSeconds": 0})
            elif not pod["spec"].get("nodeName"):
                self.send("POST", f"{path}/binding", {}, {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod["metadata"]["name"]}, "target": {"apiVersion": "v1", "kind": "Node", "name": "fake"}})
            else:
                self.pod(pod)
        services = {s["metadata"]["name"] for s in self.items("api/v1", "services")}
        if self.gateway:
            for route in self.items("apis/gateway.networking.k8s.io/v1", "httproutes"):
                self.accept(route, services)

    def pod(self, pod):
        state = self.broken.get(pod["metadata"]["labels"].get("mlops-nb/version"), "ready")
        word, now = "True" if state == "ready" else "False", "2026-01-01T00:00:00Z"
        old = pod.get("status") or {}
        if state != "failed" and any(c["type"] == "Ready" and c["status"] == word for c in old.get("conditions") or []) and old.get("phase") == "Running":
            return
        waiting = {"waiting": {"reason": "CrashLoopBackOff"}} if state == "failed" else {"running": {"startedAt": now}}
        ip = old.get("podIP") or "10.99.{}.{}".format(*divmod(next(self.count), 250))
        container = {"name": "server", "image": "x", "imageID": "x", "ready": state == "ready", "restartCount": 4 if state == "failed" else 0, "state": waiting, "lastState": {}}
        kinds = ("PodScheduled", "Initialized", "ContainersReady", "Ready")
        conditions = [{"type": k, "status": word if k in ("ContainersReady", "Ready") else "True", "lastTransitionTime": now} for k in kinds]
        known = [c for c in old.get("containerStatuses") or []]
        if known and known[0].get("restartCount") == container["restartCount"] and any(c["type"] == "Ready" and c["status"] == word for c in old.get("conditions") or []):
            return
        self.put_status("api/v1", "pods", pod, {**old, "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "hostIP": "10.98.0.1", "startTime": now,
                                                "containerStatuses": [container], "conditions": conditions})

    def accept(self, route, services):
        refs = [r["name"] for rule in route["spec"].get("rules") or [] for r in rule.get("backendRefs") or []]
        refs += [f["requestMirror"]["backendRef"]["name"] for rule in route["spec"].get("rules") or [] for f in rule.get("filters") or [] if f["type"] == "RequestMirror"]
        word = lambda ok, good, bad: {"status": "True" if ok else "False", "reason": good if ok else bad}
        lacking = not all(r in services for r in refs)
        conditions = [{"type": "Accepted", **word(True, "Accepted", "")}, {"type": "ResolvedRefs", **word(not lacking, "ResolvedRefs", "BackendNotFound")}]
        told = [{**c, "observedGeneration": route["metadata"]["generation"], "lastTransitionTime": "2026-01-01T00:00:00Z", "message": "seen"} for c in conditions]
        parents = [{"parentRef": p, "controllerName": "example.com/fake", "conditions": told} for p in route["spec"].get("parentRefs") or []]
        self.put_status("apis/gateway.networking.k8s.io/v1", "httproutes", route, {"parents": parents})


def nursed(**options):
    "A fake cluster whose pods get ready and whose gateway answers, at once"
    cluster = FakeCluster(**options)
    inner = lambda method, path, query, body: (lambda a: (a[0], {}, copy.deepcopy(a[1])))(cluster.handle(method, path, query, copy.deepcopy(body)))
    nurse = Nurse(inner)
    cluster.after.append(nurse.look)
    return cluster, nurse


class Served:
    "A fake cluster over HTTP on loopback, with a kubeconfig; `odd` may answer in its place: (method, path) -> (status, headers, body), 'close', or None"

    def __init__(self, cluster, folder):
        served, self.odd, self.seen = self, None, []

        class Handler(BaseHTTPRequestHandler):
            protocol_version, wbufsize = "HTTP/1.1", 1 << 16                  # one packet an answer

            def log_message(self, *_):
                pass

            def answer(self):
                split = urllib.parse.urlsplit(self.path)
                raw = self.rfile.read(int(self.headers.get("content-length") or 0))
                served.seen.append((self.command, split.path, self.headers.get("authorization")))
                odd = served.odd and served.odd(self.command, split.path)
                if odd == "close":
                    self.close_connection = True
                    return
                status, headers, found = odd if isinstance(odd, tuple) else cluster.send(self.command, split.path, dict(urllib.parse.parse_qsl(split.query)), json.loads(raw) if raw else None)
                if odd == "lose":
                    self.close_connection = True
                    return
                body = json.dumps(found).encode()
                self.send_response(status)
                for k, v in {"content-type": "application/json", "content-length": str(len(body)), **headers}.items():
                    self.send_header(k, v)
                self.end_headers()
                self.wfile.write(body)
            do_GET = do_POST = do_PUT = do_DELETE = answer
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(json.dumps(kubeconfig(f"http://127.0.0.1:{self.server.server_port}", "secret-token")))

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def kubeconfig(url, token, ca=None):
    "What kubectl and the client read"
    return {"apiVersion": "v1", "kind": "Config", "current-context": "test", "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "clusters": [{"name": "test", "cluster": {"server": url, **({"certificate-authority": str(ca)} if ca else {})}}], "users": [{"name": "test", "user": {"token": token}}]}


ROUTE = {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "toy"},
         "spec": {"parentRefs": [{"name": "gate"}], "hostnames": ["toy.example"], "rules": [{"timeouts": {"request": "30s"}}]}}
