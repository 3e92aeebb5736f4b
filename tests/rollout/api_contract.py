"What an API server must do for rollouts to rely on it; holds the small one to the real one. `send` acts as in `rollout.cluster`, in a namespace `models` that is empty."
import copy

from fake_cluster import ROUTE
from waiting import until

BASE = "/apis/apps/v1/namespaces/models/deployments"
ROUTES = "/apis/gateway.networking.k8s.io/v1/namespaces/models/httproutes"
DEPLOYMENT = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d", "labels": {"a": "1", "b": "2"}},
              "spec": {"replicas": 0, "selector": {"matchLabels": {"a": "1"}}, "template": {"metadata": {"labels": {"a": "1"}}, "spec": {"containers": [{"name": "server", "image": "x"}]}}}}


def make(send, path=BASE, body=DEPLOYMENT, **meta):
    body = copy.deepcopy(body)
    body["metadata"].update(meta)
    return send("POST", path, {}, body)


def seen(send):
    "The Deployment, once its controller has noticed it"
    return until(lambda: (found := send("GET", f"{BASE}/d", {}, None)[2])["metadata"]["generation"] == (found.get("status") or {}).get("observedGeneration") and found)


def check_made_once(send):
    status, _, found = make(send)
    assert status == 201 and found["metadata"]["uid"] and int(found["metadata"]["resourceVersion"]) and found["metadata"]["generation"] == 1
    status, _, found = make(send)
    assert (status, found["reason"]) == (409, "AlreadyExists")


def check_what_is_not_there(send):
    for method, body in (("GET", None), ("PUT", DEPLOYMENT), ("DELETE", {"apiVersion": "v1", "kind": "DeleteOptions"})):
        assert send(method, f"{BASE}/d", {}, copy.deepcopy(body))[0] == 404
    assert send("GET", "/apis/nowhere.example/v1/namespaces/models/things", {}, None)[0] == 404
    assert send("GET", BASE, {"labelSelector": "a=1"}, None)[2]["items"] == []


def check_a_stale_write_is_a_conflict(send):
    make(send)
    old = seen(send)
    fresh = {**copy.deepcopy(old), "spec": {**old["spec"], "minReadySeconds": 1}}
    status, _, new = send("PUT", f"{BASE}/d", {}, fresh)
    assert status == 200 and new["metadata"]["resourceVersion"] != old["metadata"]["resourceVersion"] and new["metadata"]["uid"] == old["metadata"]["uid"]
    status, _, found = send("PUT", f"{BASE}/d", {}, fresh)
    assert (status, found["reason"]) == (409, "Conflict")


def check_the_controllers_status_makes_a_naive_write_stale(send):
    _, _, made = make(send)
    seen(send)
    assert send("PUT", f"{BASE}/d", {}, made)[0] == 409


def check_the_same_again_is_no_new_version(send):
    make(send)
    old = seen(send)
    assert send("PUT", f"{BASE}/d", {}, copy.deepcopy(old))[2]["metadata"]["resourceVersion"] == old["metadata"]["resourceVersion"]


def check_generations_count_changes_of_the_spec(send):
    _, _, made = make(send, ROUTES, ROUTE)
    noted = send("PUT", f"{ROUTES}/toy", {}, {**made, "metadata": {**made["metadata"], "annotations": {"x": "1"}}})[2]
    assert noted["metadata"]["generation"] == made["metadata"]["generation"] == 1 and noted["metadata"]["annotations"] == {"x": "1"}
    changed = send("PUT", f"{ROUTES}/toy", {}, {**noted, "spec": {**noted["spec"], "hostnames": ["other.example"]}})[2]
    assert changed["metadata"]["generation"] == 2


def check_status_is_written_apart(send):
    _, _, made = make(send, ROUTES, ROUTE)
    parents = {"parents": [{"parentRef": {"name": "gate"}, "controllerName": "example.com/x", "conditions": []}]}
    plain = send("PUT", f"{ROUTES}/toy", {}, {**made, "status": parents})[2]
    assert not plain.get("status") and plain["metadata"]["generation"] == 1
    found = send("PUT", f"{ROUTES}/toy/status", {}, {**plain, "status": parents, "spec": {**plain["spec"], "hostnames": ["no.example"]}})[2]
    assert found["status"]["parents"][0]["controllerName"] == "example.com/x" and found["spec"]["hostnames"] == ["toy.example"] and found["metadata"]["generation"] == 1
    assert found["metadata"]["resourceVersion"] != plain["metadata"]["resourceVersion"]


def check_lists_by_labels(send):
    for name, labels in (("d", {"a": "1", "b": "2"}), ("e", {"a": "1", "b": "3"})):
        make(send, name=name, labels=labels)
    names = lambda selector: sorted(i["metadata"]["name"] for i in send("GET", BASE, {"labelSelector": selector}, None)[2]["items"])
    assert (names("a=1"), names("a=1,b=3"), names("a=2")) == (["d", "e"], ["e"], [])


def check_what_is_wrong_is_refused(send):
    make(send)
    old = seen(send)
    bad = {**old, "spec": {**old["spec"], "selector": {"matchLabels": {"b": "2"}}}}
    assert send("PUT", f"{BASE}/d", {}, bad)[0] == 422
    route = copy.deepcopy(ROUTE)
    route["spec"]["rules"] = [{"backendRefs": [{"name": "x", "port": 80, "weight": -5}]}]
    assert send("POST", ROUTES, {}, route)[0] == 422


def check_deleting_what_was_read(send):
    make(send)
    old = seen(send)
    options = lambda found: {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background", "preconditions": {k: found["metadata"][k] for k in ("uid", "resourceVersion")}}
    send("PUT", f"{BASE}/d", {}, {**old, "spec": {**old["spec"], "minReadySeconds": 1}})
    assert send("DELETE", f"{BASE}/d", {}, options(old))[0] == 409
    assert send("DELETE", f"{BASE}/d", {}, options(seen(send)))[0] == 200
    until(lambda: send("GET", f"{BASE}/d", {}, None)[0] == 404)
    make(send)
    assert seen(send)["metadata"]["uid"] != old["metadata"]["uid"]


def check_a_deployment_makes_pods_and_counts_them(send):
    make(send)
    found = seen(send)
    for n in (2, 0):
        found = until(lambda n=n: (a := send("PUT", f"{BASE}/d", {}, {**seen(send), "spec": {**found["spec"], "replicas": n}}))[0] == 200 and a[2])
        until(lambda n=n: (seen(send)["status"].get("replicas", 0)) == n)


CHECKS = {name.removeprefix("check_"): check for name, check in dict(globals()).items() if name.startswith("check_")}
