"Engines on a world's target, the other ports in memory, which may be killed and go on."
import itertools

from contract import NEW, OLD, started

from mlops_nb.rollout.engine import Engine, begin
from mlops_nb.rollout.memory import MemoryClock, MemoryPointer, MemoryStore
from mlops_nb.rollout.strategies import ENDS, make_spec


class Killed(BaseException):
    "The end of a process"


def judge(blocks, spec, late):
    "Aborts on errors, promotes when there were requests enough"
    had, bad = (sum(b["candidate"][k] for b in blocks) for k in ("requests", "errors"))
    return {"action": "abort" if bad > 5 else "promote" if had >= spec.min_requests else "pause" if late else "continue", "reasons": [f"{bad} of {had} failed"], "evidence": {}}


class Rolled:
    "A rollout of version 4 in a world where 3 has all traffic"

    def __init__(self, world, outcome="good", quick=True, **spec):
        self.world, self.outcome, self.clock, self.store, self.pointer, self.count = world, outcome, MemoryClock(1000.0), MemoryStore(), MemoryPointer("3"), itertools.count(1)
        self.watched, sleep = [], self.clock.sleep
        started(world, 0)
        world.until(lambda: world.target.remove(NEW, 0) or world.target.revisions() == [OLD])
        if outcome in ("waiting", "failed", "wrong"):
            world.break_("4", outcome)
        if not quick:
            import time
            self.clock.sleep = lambda seconds: (time.sleep(0.05), sleep(0.1))
        wanted = {"strategy": "canary", "steps": [50, 100], "bake": 1, "deadline": 60, "prepare": 60, "settle": 60, "min_requests": 100, "drain": 0, **spec}
        begin(self.store, self.clock, "toy", make_spec(**wanted), OLD, NEW, "ada")

    def block(self, stable, candidate, since, until, slow):
        n = 0 if self.outcome == "silent" else 60
        return {"time": until, "stable": {"requests": n, "errors": 0}, "candidate": {"requests": n, "errors": 3 if self.outcome == "errors" else 0}}

    def engine(self, owner=None):
        metrics = type("Metrics", (), {"slow": staticmethod(lambda *_: 0.1), "block": staticmethod(self.block)})()
        return Engine("toy", self.world.target, self.store, self.clock, metrics, self.pointer, judge, owner=owner or f"engine-{next(self.count)}")

    def finish(self):
        "Let another engine end it, when the lease of the one before is over"
        self.clock.time += 16
        return self.engine().run()

    def check(self):
        "What must hold in the end; the state"
        record, target = self.store.load("toy"), self.world.target
        assert record.state in ENDS, record
        if record.state != "paused":
            winner = "4" if record.state == "done" else "3"
            routes = self.world.until(target.routed)
            assert {v: w for v, w in routes.weights.items() if w} == {winner: 100} and not routes.mirror
            assert [r.version for r in target.revisions()] == [winner]
            assert target.ready(target.revisions()[0]).state == "ready" and self.pointer.version == winner
            refs = [r["name"] for rule in self.world.route()["spec"]["rules"] for r in rule["backendRefs"]]
            assert len(set(refs)) == 1, "the route names what is gone"
            assert self.world.autoscalers() == {winner: (1, 10)}
        return record.state
