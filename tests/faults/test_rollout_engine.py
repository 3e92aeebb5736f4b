"""The engine under every kill and fault, in every strategy: one version has the traffic, nothing is orphaned, no event is missing."""
import random
import sqlite3
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mlops_nb.audit import events, verify
from mlops_nb.core import MlopsError
from mlops_nb.rollout.engine import Engine, begin, rescue, unattended
from mlops_nb.rollout.memory import Faulty, MemoryClock, MemoryPointer, MemoryStore, MemoryTarget
from mlops_nb.rollout.ports import Fenced, Revision, Routes
from mlops_nb.rollout.store import StateStore
from mlops_nb.rollout.strategies import ENDS, MOVES, make_spec

OLD, NEW = Revision("3"), Revision("4")
STRATEGIES = {"canary": {"steps": [10, 50, 100]}, "blue-green": {}, "rolling": {"replicas": 3}, "shadow": {}, "ab": {}}
OUTCOMES = ("good", "errors", "silent", "unready", "failed", "wrong", "refused")


class Killed(BaseException):
    "The end of a process: nothing of it runs any more"


def judge(blocks, spec, late):
    "Aborts on errors, promotes when there were requests enough"
    had, bad = (sum(b["candidate"][k] for b in blocks) for k in ("requests", "errors"))
    return {"action": "abort" if bad > 5 else "promote" if had >= spec.min_requests else "pause" if late else "continue", "reasons": [f"{bad} of {had} failed"], "evidence": {"had": had}}


class World:
    "Ports in memory, and engines on them that may be killed"

    def __init__(self, strategy, outcome="good", store=None, **spec):
        self.clock, self.target, self.store, self.pointer = MemoryClock(1000.0), MemoryTarget(), store or MemoryStore(), MemoryPointer("3", "no approval" if outcome == "refused" else "")
        self.target.ensure(OLD, 1, 0)
        self.target.route(Routes({"3": 100}))
        self.target.broken = {"4": {"unready": "waiting"}.get(outcome, outcome)} if outcome in ("unready", "failed", "wrong") else {}
        self.outcome, self.calls, self.engines = outcome, [], 0
        begin(self.store, self.clock, "toy", make_spec(strategy=strategy, **{"bake": 3, "deadline": 40, "prepare": 40, "min_requests": 100, **STRATEGIES[strategy], **spec}), OLD, NEW, "ada")

    def block(self, stable, candidate, since, until, slow):
        n = 0 if self.outcome == "silent" else 60
        return {"time": until, "stable": {"requests": n, "errors": 0}, "candidate": {"requests": n, "errors": 3 if self.outcome == "errors" else 0}}

    def engine(self, before=lambda k: None, after=lambda k: None, owner=None):
        "A new engine; its ports' calls are counted together"
        self.engines += 1
        metrics = type("Metrics", (), {"slow": staticmethod(lambda *_: 0.1), "block": staticmethod(self.block)})()
        ports = [Faulty(p, self.calls, before, after) for p in (self.target, self.store, self.clock, metrics, self.pointer)]
        return Engine("toy", *ports, judge, owner=owner or f"engine-{self.engines}")

    def finish(self):
        "Let a new engine end the rollout"
        self.clock.sleep(16)                      # the lease of the one before is over
        return self.engine().run()

    def check(self):
        "What must hold in the end, whatever happened"
        record, target = self.store.load("toy"), self.target
        assert record.state in ENDS, record
        assert target.dropped == 0, "a version without processes had traffic"
        assert sum(target.routes.weights.values()) == 100
        shares = {v: w for v, w in target.routes.weights.items() if w}
        if record.state != "paused":
            winner = "4" if record.state == "done" and record.spec["strategy"] != "shadow" else "3"
            assert shares == {winner: 100} and not target.routes.mirror and list(target.running) == [winner]
            assert self.pointer.version == winner
            assert target.running[winner][1] == record.spec["replicas"]
        else:
            assert all(v in target.running for v in shares)
        told = self.events()
        assert told[0]["action"] == "rollout pending"
        moves = [(e["evidence"]["from"], e["evidence"]["to"]) for e in told[1:] if "from" in (e["evidence"] or {})]
        assert [a for a, _ in moves] == ["pending", *[b for _, b in moves[:-1]]], "an event is missing or double"
        assert moves[-1][1] == record.state and all(b in MOVES[a] for a, b in moves)
        return record

    def events(self):
        return self.store.events if isinstance(self.store, MemoryStore) else events(self.store.engine)


EXPECTED = {"good": "done", "errors": "rolled_back", "unready": "rolled_back", "failed": "rolled_back", "wrong": "rolled_back", "silent": "paused", "refused": "paused"}


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_ends_as_it_should(strategy, outcome):
    world = World(strategy, outcome)
    world.engine().run()
    expected = "done" if strategy == "shadow" and outcome == "refused" else EXPECTED[outcome]
    assert world.check().state == expected


def test_a_gate_that_waits_keeps_the_step():
    "However many requests there were: no more traffic before the labels have come"
    world, weights = World("canary", steps=[10, 50, 100], deadline=400), []

    def patient(blocks, spec, late):
        weights.append(world.target.routes.weights["4"])
        return {"action": "wait" if len(blocks) < 20 else "promote", "reasons": [], "evidence": {}}
    engine = world.engine()
    engine.judge = patient
    engine.run()
    assert world.check().state == "done" and set(weights[:20]) == {10} and {10, 50, 100} <= set(weights)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("outcome", ["good", "errors", "failed", *(pytest.param(o, marks=pytest.mark.drill) for o in ("silent", "refused"))])
@pytest.mark.parametrize("strategy", ["canary", "blue-green", *(pytest.param(s, marks=pytest.mark.drill) for s in ("rolling", "shadow", "ab"))])
def test_killed_at_every_call_of_a_port(strategy, outcome, moment):
    whole = World(strategy, outcome)
    whole.engine().run()
    expected, calls = whole.check().state, len(whole.calls)
    for k in range(1, calls + 1):
        world = World(strategy, outcome)

        def kill(at, k=k):
            if at == k:
                raise Killed
        try:
            world.engine(**{moment: kill}).run()
        except Killed:
            assert world.store.load("toy").state in ENDS or len(world.calls) == k or moment == "before" or world.calls[k - 1]
            world.calls.clear()
            if world.store.load("toy").state not in ENDS:
                world.finish()
        assert world.check().state == expected, (k, world.calls[-3:])


FEW = [range(6), pytest.param(range(6, 26), marks=pytest.mark.drill)]


@pytest.mark.parametrize("seeds", FEW, ids=["few", "many"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_again_and_again_at_random(strategy, seeds):
    for seed in seeds:
        rng, outcome = random.Random(seed), ("good", "errors")[seed % 2]
        world = World(strategy, outcome, deadline=2000, prepare=2000)

        def maybe(at, rng=rng):
            if rng.random() < 0.04:
                raise Killed
        for _ in range(200):
            try:
                world.engine(before=maybe, after=maybe).run()
                break
            except Killed:
                world.clock.sleep(20)
        if world.store.load("toy").state not in ENDS:
            world.finish()
        assert world.check().state == EXPECTED[outcome]


@pytest.mark.parametrize("seeds", FEW, ids=["few", "many"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_calls_that_fail_time_out_or_lose_their_answer(strategy, seeds):
    for seed in seeds:
        rng, outcome = random.Random(seed), ("good", "errors", "silent")[seed % 3]
        world = World(strategy, outcome, deadline=500, prepare=500)

        def fault(at, rng=rng, world=world):
            if not world.calls[-1].startswith(("MemoryStore", "MemoryClock")) and rng.random() < 0.15:
                raise rng.choice([TimeoutError("late"), ConnectionResetError("lost"), MlopsError("409 conflict")])
        world.engine(before=fault, after=fault).run()
        assert world.check().state in (EXPECTED[outcome], "paused")


def test_a_lost_store_stops_the_engine_and_another_goes_on():
    for k in range(1, 60):
        world = World("canary")

        def fail(at, k=k, world=world):
            if at == k and world.calls[-1].startswith("MemoryStore"):
                raise OSError(28, "no space left on device")
        try:
            world.engine(after=fail).run()
        except OSError:
            world.finish()
        assert world.check().state == "done"


def test_of_two_engines_one_works():
    for seed in range(30):
        world, rng = World("canary"), random.Random(seed)
        pair, alone = [world.engine(), world.engine()], 0
        for _ in range(400):
            engine = rng.choice(pair)
            world.clock.sleep(rng.choice([0, 1, 1, 30]))
            try:
                if engine.turn().state in ENDS:
                    break
            except Fenced:
                alone += 1
        assert world.check().state == "done" and alone


def test_an_engine_that_slept_cannot_undo_what_its_successor_did():
    world = World("canary", "errors")
    slow = world.engine()
    while slow.turn().state != "analysing":
        pass
    stale = replace(world.store.load("toy").routes, fence=slow.fence)
    assert world.finish().state == "rolled_back"
    with pytest.raises(Fenced):
        world.target.route(stale)
    with pytest.raises(Fenced):
        world.store.save(replace(world.store.load("toy"), fence=slow.fence))
    world.check()


def test_a_clock_that_jumps():
    for seed in range(20):
        world, rng = World("canary", deadline=10_000, prepare=10_000), random.Random(seed)
        engine = world.engine()
        for _ in range(2000):
            world.clock.time = max(1000.0, world.clock.time + rng.choice([0, 1, 1, 1, -3600, 3600]))
            if engine.turn().state in ENDS:
                break
        assert world.check().state == "done"


STATES = ["pending", "preparing", "smoking", "setting", "settling", "analysing", "baking", "promoting", "retiring"]


def until_in(world, engine, state):
    "Turns until a rollout is in a state"
    for _ in range(200):
        if engine.turn().state == state:
            return
        world.clock.sleep(1)
    raise AssertionError(state)


@pytest.mark.parametrize("state", STATES)
def test_a_clock_set_back_an_hour_is_waited_for_by_nobody(state):
    "The engine that lives goes on in its own time; one that was killed just before keeps nobody away"
    for killed in (False, True):
        world = World("canary", deadline=10_000)
        world.clock.time, engine = 10_000.0, world.engine()
        if state != "pending":
            until_in(world, engine, state)
        world.clock.time -= 3600
        began = world.clock.time
        if killed:
            while not (found := rescue(world.engine(owner="watcher"))):
                assert world.clock.time < began + 120
                world.clock.sleep(2)
            assert found.state == ("done" if state in ("promoting", "retiring") else "rolled_back")
        else:
            while engine.turn().state not in ENDS:
                world.clock.sleep(1)
        assert world.check().state in ENDS and world.clock.time < began + 120


@pytest.mark.parametrize("state", STATES)
def test_a_machine_that_slept_takes_no_good_rollout_back(state):
    "The watcher wakes up before the engine does, and every lease looks old"
    world = World("canary", deadline=10_000, prepare=10_000, settle=10_000)
    engine = world.engine()
    if state != "pending":
        until_in(world, engine, state)
    engine.turn()
    world.clock.time += 3600
    sleep, world.clock.sleep = world.clock.sleep, lambda seconds: (sleep(seconds), engine.turn())
    assert rescue(world.engine(owner="watcher")) is None
    world.clock.sleep = sleep
    while engine.turn().state not in ENDS:
        sleep(1)
    assert world.check().state == "done"


def test_an_engine_that_looks_seldom_keeps_its_lease_and_hears_what_is_asked():
    world = World("canary", "silent", interval=60, deadline=10_000)
    sleep, slept = world.clock.sleep, []

    def rest(seconds):
        sleep(seconds)
        slept.append(seconds)
        assert not unattended(world.store, "toy", world.clock.now())
        if len(slept) == 200:
            world.store.wish("toy", "abort", "ada")
        if len(slept) > 202:
            assert world.store.load("toy").state in ("rolling_back", "rolled_back")
    world.clock.sleep = rest
    assert world.engine().run().state == "rolled_back" and max(slept) <= 2
    world.check()


def test_a_route_changed_by_hand_is_put_right():
    world = World("canary", "silent", deadline=50)
    engine = world.engine()
    while engine.turn().state != "analysing":
        pass
    world.target.routes = Routes({"3": 1, "4": 99}, fence=world.target.highest)
    engine.turn()
    assert world.target.routes.weights == {"3": 90, "4": 10}


def test_ready_then_dead_and_the_stable_one_dying_in_between():
    world = World("canary", "silent", deadline=500)
    engine = world.engine()
    while engine.turn().state != "analysing":
        pass
    world.target.broken = {"4": "failed", "3": "waiting"}        # both are gone: nowhere to go back to
    for _ in range(50):
        engine.turn()
        world.clock.sleep(1)
    assert world.store.load("toy").state == "rolling_back" and world.target.routes.weights == {"3": 90, "4": 10}
    world.target.broken = {"4": "failed"}                        # the stable one is back
    assert engine.run().state == "rolled_back"
    world.check()


@pytest.mark.parametrize("block", [None, "raises"])
def test_measurements_that_cannot_be_had_are_no_good_news(block):
    world = World("canary", deadline=30)

    def none(*_):
        if block == "raises":
            raise TimeoutError("the source is down")
    world.block = none
    world.engine().run()
    record = world.check()
    assert record.state in ("paused", "rolled_back") and record.step == 0


def test_wishes_are_obeyed_or_refused_in_every_state():
    for wish, possible in {"pause": "paused", "abort": "rolled_back", "promote": "done"}.items():
        for turns in range(40):
            world = World("canary")
            engine = world.engine()
            for _ in range(turns):
                if engine.turn().state in ENDS:
                    break
                world.clock.sleep(1)
            world.store.wish("toy", wish, "ada", "because")
            record = engine.run()
            assert record.state in (possible, "done") and not world.store.wishes("toy")
            assert any(e["actor"] == "ada" and (e["action"].endswith("refused") or "because" in e["reason"]) for e in world.store.events[1:])
            if record.state == "paused":
                world.store.wish("toy", "resume", "ada")
                assert world.engine(owner=engine.owner).run().state == "done"
            if not any("refused" in e["action"] for e in world.store.events):
                world.check()


def test_a_split_without_an_engine_is_taken_back():
    states = set()
    for k in range(1, 200):
        world = World("canary", "silent", deadline=300)

        def kill(at, k=k):
            if at == k:
                raise Killed
        try:
            world.engine(before=kill).run()
        except Killed:
            states.add(world.store.load("toy").state)
            world.clock.sleep(10)
            assert not unattended(world.store, "toy", world.clock.now())
            world.clock.sleep(60)
            record = rescue(world.engine(owner="watcher"))
            assert record.state in ("rolled_back", "done") and world.target.routes.weights["3"] == 100
            world.calls.clear()
            world.check()
    assert {"preparing", "smoking", "setting", "settling", "analysing"} <= states


# ----- the store in a database -----

@pytest.mark.parametrize("strategy", ["canary", pytest.param("shadow", marks=pytest.mark.drill)])
def test_killed_with_the_record_in_a_database(tmp_path, strategy):
    for k in range(1, 70, 30):
        world = World(strategy, store=StateStore(url=f"sqlite:///{tmp_path}/{strategy}{k}.db"))

        def kill(at, k=k):
            if at == k:
                raise Killed
        try:
            world.engine(after=kill).run()
        except Killed:
            world.finish()
        assert world.check().state == "done"
        assert verify(world.store.engine)["ok"]


def test_a_disk_that_is_full_for_a_while(tmp_path):
    "SQLite itself says so; the engine stops, nothing of that turn is half written, and one that comes when there is room again ends the rollout"
    from sqlalchemy import event
    store, states = StateStore(url=f"sqlite:///{tmp_path}/state.db"), set()
    world = World("canary", store=store, deadline=2000, prepare=2000)

    def room(pages):
        store.engine.dispose()
        event.listen(store.engine, "connect", lambda raw, _: raw.execute(f"PRAGMA max_page_count = {pages}"))
    for _ in range(60):
        engine = world.engine()
        with sqlite3.connect(tmp_path / "state.db") as db:
            full = db.execute("PRAGMA page_count").fetchone()[0]
        room(full)
        try:
            while engine.turn().state not in ENDS:
                world.clock.sleep(1)
        except Exception as e:
            assert "full" in str(e)
            states.add(store.load("toy").state)
        room(2**30)
        if store.load("toy").state in ENDS:
            break
        world.clock.sleep(16)
        engine = world.engine()
        engine.turn()
        engine.leave()
    assert world.check().state == "done" and verify(store.engine)["ok"] and states


def test_the_store_in_postgres(postgres):
    world = World("canary", store=StateStore(url=postgres.new_database()))
    engine = world.engine()
    for _ in range(6):
        engine.turn()
    assert world.store.acquire("toy", "other", 10, world.clock.now()) is None
    assert world.finish().state == "done"
    assert world.check() and verify(world.store.engine)["ok"]


def test_a_damaged_record_is_refused_and_traffic_stays(tmp_path):
    world = World("canary", store=StateStore(url=f"sqlite:///{tmp_path}/state.db"))
    engine = world.engine()
    while engine.turn().state != "analysing":
        pass
    with sqlite3.connect(tmp_path / "state.db") as db:
        db.execute("UPDATE rollouts SET record = replace(record, 'analysing', 'retiring')")
    before = world.target.routes
    with pytest.raises(MlopsError, match="is damaged"):
        world.finish()
    assert world.target.routes == before and set(world.target.running) == {"3", "4"}


def test_a_second_rollout_is_refused_while_one_goes_on():
    world = World("canary")
    spec = make_spec()
    with pytest.raises(MlopsError, match="resume or abort it first"):
        begin(world.store, world.clock, "toy", spec, OLD, NEW, "bob", owner="bob")
    world.engine().turn()
    with pytest.raises(MlopsError, match="a rollout is going on"):
        begin(world.store, world.clock, "toy", spec, OLD, NEW, "bob", owner="bob")
    assert SimpleNamespace(**vars(world)).store.load("toy").number == 1


@pytest.mark.parametrize("strategy, spec", [("blue-green", {}), ("canary", {"steps": [50, 100]}), ("rolling", {"replicas": 1})])
def test_a_version_that_breaks_when_it_has_all_the_traffic_goes_back(strategy, spec):
    "By the real gate: as good as the other beside it, and useless alone"
    from mlops_nb.rollout.run import gate
    world = World(strategy, **{"bake": 30, "deadline": 400, "min_requests": 200, "policy": {"margin": 0.05}, **spec})
    def block(stable, candidate, since, until, slow):
        alone = world.target.routes.weights.get(candidate) == 100
        counts = lambda n, bad: {"requests": n, "errors": bad, "slow": 0, "latency_sum": 0.01 * n}
        return {"time": until, "stable": counts(0 if alone else 100, 0), "candidate": counts(200 if alone else 100, 200 if alone else 0)}
    world.block = block
    engine = world.engine()
    engine.judge = gate
    record = engine.run()
    assert record.state == "rolled_back" and "all the traffic" in record.reason and world.pointer.version == "3"
    assert sum(b["candidate"]["requests"] for b in record.blocks if b["candidate"]["errors"]) <= 600      # within three looks


@pytest.mark.parametrize("wanted", ["abort", "rescue"])
def test_killed_after_the_registry_was_told(wanted):
    "What is served and what the registry names agree, whoever ends it"
    world = World("canary")
    point = world.pointer.point
    def told_and_killed(*args):
        point(*args)
        raise Killed
    world.pointer.point = told_and_killed
    with pytest.raises(Killed):
        world.engine().run()
    world.pointer.point = point
    assert world.store.load("toy").state == "promoting" and world.pointer.version == "4"
    world.clock.sleep(100)
    if wanted == "abort":
        world.store.wish("toy", "abort", "ann", "no")
    record = world.engine().run() if wanted == "abort" else rescue(world.engine())
    assert record.state == ("rolled_back" if wanted == "abort" else "done")
    assert {v for v, w in world.target.routes.weights.items() if w} == {world.pointer.version}


def test_a_damaged_record_is_put_aside(tmp_path):
    "All the traffic goes to what the registry says is served; the record's text is in the trail; a new rollout begins, also where the target has seen a higher fence than the store"
    from mlops_nb.rollout.run import Rollout
    target = MemoryTarget()
    rollout = Rollout(tmp_path, "toy", (target, SimpleNamespace()))
    rollout.pointer, rollout.revision = MemoryPointer("3"), lambda ref: Revision(str(ref))
    for revision in (OLD, NEW):
        target.ensure(revision, 1, 40)
    target.route(Routes({"3": 100}, fence=40))
    rollout.pointer.been = lambda version: True
    rollout.start(NEW, make_spec(strategy="canary"))
    with pytest.raises(MlopsError, match="not damaged"):
        rollout.discard()
    target.route(Routes({"3": 50, "4": 50}, fence=41))
    rollout.store.engine.dispose()
    with sqlite3.connect(tmp_path / ".mlops_nb/state.db") as db:
        db.execute("UPDATE rollouts SET record = replace(record, 'pending', 'done')")
    with pytest.raises(MlopsError, match="abort --damaged"):
        rollout.status()
    assert rollout.discard("ann", "disk").version == "3" and target.routes.weights == {"3": 100}
    assert [e["action"] for e in events(rollout.store.engine)][-1] == "rollout discarded" and verify(rollout.store.engine)["ok"]
    record = rollout.start(NEW, make_spec(strategy="canary"))
    assert record.state == "pending" and record.fence > 41


def test_a_policy_that_cannot_judge_is_refused_before_traffic_moves(tmp_path):
    "A wrong key or value of the gate's policy is found when the rollout is begun"
    from mlops_nb.rollout.run import Rollout
    target = MemoryTarget()
    rollout = Rollout(tmp_path, "toy", (target, SimpleNamespace()))
    rollout.pointer = MemoryPointer("3")
    target.ensure(OLD, 1, 0)
    target.route(Routes({"3": 100}))
    for policy, said in (({"alpah": 0.1}, "alpah"), ({"alpha": 5}, "alpha"), ({"margin": "much"}, "margin")):
        with pytest.raises(MlopsError, match=said):
            rollout.start(NEW, make_spec(strategy="canary", policy=policy))
    assert rollout.store.load("toy") is None
