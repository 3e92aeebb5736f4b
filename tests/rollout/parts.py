"""What the tests of rollouts share: a small gate, load, and a platform of toy servers."""
import http.client
import json
import math
import sys
import threading
import time
from pathlib import Path

from mlops_nb.rollout.access_log import AccessLog
from mlops_nb.rollout.envoy import Gateway
from mlops_nb.rollout.local import LocalTarget, platform_dir
from mlops_nb.rollout.memory import MemoryPointer
from mlops_nb.rollout.platform import down, up
from mlops_nb.rollout.ports import Revision
from mlops_nb.rollout.run import Rollout

OLD, NEW = Revision("3", "toy"), Revision("4", "toy")


def judge(blocks, spec, late, alpha=0.01):
    "A one-sided 2x2 e-process on errors: enough of a gate to test the engine with"
    ns = nc = es = ec = 0
    log_e = 0.0
    for b in blocks:
        ms, ys, mc, yc = b["stable"]["requests"], b["stable"]["errors"], b["candidate"]["requests"], b["candidate"]["errors"]
        ts = (es + 0.5) / (ns + 25)
        tc = min(0.95, max((ec + 0.5) / (nc + 25), 1.5 * ts))
        if ms + mc:
            t0 = (ms * ts + mc * tc) / (ms + mc)
            log_e += sum(y * math.log(t / t0) + (m - y) * math.log((1 - t) / (1 - t0)) for m, y, t in ((ms, ys, ts), (mc, yc, tc)))
        ns, nc, es, ec = ns + ms, nc + mc, es + ys, ec + yc
    evidence = {"log_e": log_e, "stable": [ns, es], "candidate": [nc, ec]}
    if log_e >= math.log(1 / alpha):
        return {"action": "abort", "reasons": [f"candidate {ec} of {nc} failed, stable {es} of {ns}"], "evidence": evidence}
    if nc >= spec.min_requests:
        return {"action": "promote", "reasons": [f"{nc} requests, {ec} failed"], "evidence": evidence}
    return {"action": "pause" if late else "continue", "reasons": [f"{nc} requests"], "evidence": evidence}


class Load:
    "Clients that ask without a pause, or at a rate, on connections that stay open; counts what they got"

    def __init__(self, port, clients=4, rate=100, path="/predict", headers=None, body=b'{"rows": [{}]}'):
        self.port, self.pause, self.path, self.headers, self.body = port, clients / rate, path, headers or {}, body
        self.seen, self.failed, self.stopping = {}, [], threading.Event()
        self.lock, self.total = threading.Lock(), 0
        self.threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(clients)]

    def _ask(self, number):
        connection, turn = None, time.monotonic()
        while not self.stopping.is_set():
            turn, began = turn + self.pause, time.time()
            try:
                if connection is None:
                    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=100)
                connection.request("POST", self.path, self.body, {"content-type": "application/json", "x-user-id": f"u{number}", **self.headers})
                answer = connection.getresponse()
                answer.read()
                self._count(began, answer.status, answer.getheader("x-model-version"))
            except (OSError, http.client.HTTPException) as e:
                self._count(began, repr(e), None)
                connection = None
            self.stopping.wait(max(0, turn - time.monotonic()))

    def _count(self, began, status, version):
        with self.lock:
            self.total += 1
            if status == 200:
                self.seen[version] = self.seen.get(version, 0) + 1
            else:
                self.failed.append((began, status, version))

    def failed_since(self, moment):
        "Failures of requests begun after a moment; Envoy may tell a caller a second late that its answer was cut off"
        return [f for f in self.failed if f[0] > moment]

    def __enter__(self):
        for t in self.threads:
            t.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        for t in self.threads:
            t.join(110)


class Toys:
    "A real Envoy, real supervisor and toy servers in a folder; a context manager"

    def __init__(self, root, **options):
        self.root, self.faults, self.options = Path(root), Path(root) / "faults", options
        self.faults.mkdir(parents=True, exist_ok=True)
        (self.root / "params.yaml").write_text("base: {name: toy}\n")

    def __enter__(self):
        command = [sys.executable, str(Path(__file__).with_name("toy_server.py")), "{version}", "{port}", str(self.faults)]
        try:
            self.status = up(self.root, "toy", Gateway(port=0, **self.options.pop("gateway", {})), command=command, revision=OLD, example=lambda r: {}, seconds=180, **self.options)
        except BaseException:
            down(self.root)
            raise
        self.port, self.folder = int(self.status["gateway"].rsplit(":", 1)[1]), platform_dir(self.root)
        return self

    def __exit__(self, *_):
        down(self.root, drain=1)

    def misbehave(self, version, **faults):
        "Tell a version how to misbehave from now on"
        path = self.faults / f"{version}.json"
        path.with_suffix(".new").write_text(json.dumps(faults))
        path.with_suffix(".new").replace(path)

    def rollout(self, pointer="3", judge=judge):
        "Rollouts of the toy"
        target = LocalTarget(self.root, example=lambda r: {})
        made = Rollout(self.root, "toy", (target, AccessLog(self.folder / "access.log")), judge)
        made.pointer = MemoryPointer(pointer)
        return made
