"Rollouts on the small API server under every fault: calls that fail, conflict, are lost before or after they were carried out; engines killed at each; people who meddle."
import random
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "rollout")]
from contract import NEW, OLD  # noqa: E402
from engines import Killed, Rolled  # noqa: E402
from worlds import ROUTES, small  # noqa: E402

from mlops_nb.rollout.engine import rescue  # noqa: E402
from mlops_nb.rollout.ports import Fenced, Routes  # noqa: E402
from mlops_nb.rollout.strategies import ENDS  # noqa: E402

EXPECTED = {"good": "done", "errors": "rolled_back", "waiting": "rolled_back", "failed": "rolled_back", "wrong": "rolled_back", "silent": "paused"}


class Faults:
    "Around every request: `before` and `after` may raise or answer in its place"

    def __init__(self):
        self.calls, self.before, self.after = [], lambda k: None, lambda k: None

    def wrap(self, send):
        def faulty(method, path, query, body):
            self.calls.append((method, path))
            k = len(self.calls)
            if answer := self.before(k):
                return answer
            found = send(method, path, query, body)
            return self.after(k) or found
        return faulty


def rolled(outcome="good", **spec):
    "A rollout on the small server with faults around its requests, its API's time not our own"
    faults, time = Faults(), [0.0]
    world = small(wrap=faults.wrap, clock=lambda: 5000.0, **{"sleep": lambda s: time.__setitem__(0, time[0] + s)})
    world.target.api.clock = lambda: time[0]
    made = Rolled(world, outcome, **spec)
    faults.calls.clear()
    watch(world)
    return made, faults


def watch(world):
    "After every write: weights add up, and whoever has weight has ready pods"
    def look():
        route = world.cluster.objects[("httproutes", "models", "toy")]
        refs = {r["name"]: r["weight"] for r in route["spec"]["rules"][-1]["backendRefs"]}
        assert sum(refs.values()) == 100
        for name, weight in refs.items():
            made = world.cluster.objects.get(("deployments", "models", name))
            assert not weight or made and made["spec"]["replicas"] >= 1 and ("services", "models", name) in world.cluster.objects, f"{name} has {weight} % and no pods"
    world.cluster.after.append(look)


@pytest.mark.parametrize("outcome", EXPECTED)
@pytest.mark.parametrize("strategy", [{}, {"strategy": "blue_green", "steps": None}, {"strategy": "rolling", "steps": None, "replicas": 3}, {"strategy": "shadow", "steps": None}])
def test_every_strategy_ends_as_it_should(strategy, outcome):
    made, _ = rolled(outcome, **strategy)
    made.engine().run()
    shadow = strategy.get("strategy") == "shadow"
    if strategy.get("strategy") == "blue_green" and outcome == "silent":
        assert made.store.load("toy").state == "paused"
    elif shadow and made.store.load("toy").state == "done":
        assert Routes({"3": 100}).same(made.world.target.routed()) and made.world.target.revisions() == [OLD]
    else:
        assert made.check() == EXPECTED[outcome]


def killed_at(moment, outcome, ks):
    whole, faults = rolled(outcome)
    whole.engine().run()
    total = len(faults.calls)
    for k in ks(total):
        made, faults = rolled(outcome)

        def kill(at, k=k):
            if at == k:
                raise Killed
        setattr(faults, moment, kill)
        with pytest.raises(Killed):
            made.engine().run()
        setattr(faults, moment, lambda at: None)
        made.finish()
        assert made.check() == EXPECTED[outcome], (k, faults.calls[k - 1])
    return total


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("outcome", ["good", "errors"])
def test_killed_at_some_requests(moment, outcome):
    assert killed_at(moment, outcome, lambda total: range(1, total + 1, 61)) > 50


@pytest.mark.drill
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("outcome", ["good", "errors"])
def test_killed_at_every_request(moment, outcome):
    killed_at(moment, outcome, lambda total: range(1, total + 1))


ODD = [(500, {}, {}), (503, {}, {}), (429, {"Retry-After": "2"}, {}), (409, {}, {"message": "conflict"}), (410, {}, {}), "lost"]


MANY = pytest.param(range(2, 12), marks=pytest.mark.drill)


@pytest.mark.parametrize("seeds", [range(2), MANY], ids=["few", "many"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_requests_that_fail_conflict_or_lose_their_answer(moment, seeds):
    for seed in seeds:
        rng, outcome = random.Random(seed), ("good", "errors")[seed % 2]
        made, faults = rolled(outcome)

        def fault(at, rng=rng):
            if rng.random() < 0.15:
                odd = rng.choice(ODD)
                if odd == "lost":
                    raise OSError("connection closed")
                return odd
        setattr(faults, moment, fault)
        made.engine().run()
        setattr(faults, moment, lambda at: None)
        assert made.check() == EXPECTED[outcome], seed


def test_an_api_server_that_is_away_for_a_while():
    for start in (5, 40, 80, 120):
        made, faults = rolled()

        def away(at, start=start):
            if start <= at < start + 30:
                raise OSError("connection refused")
        faults.before = away
        made.engine().run()
        assert made.check() == "done"


@pytest.mark.parametrize("seeds", [range(2), MANY], ids=["few", "many"])
def test_of_two_engines_one_works(seeds):
    for seed in seeds:
        made, rng = rolled()[0], random.Random(seed)
        pair, alone = [made.engine(), made.engine()], 0
        for _ in range(300):
            made.clock.sleep(rng.choice([0, 1, 1, 30]))
            try:
                if rng.choice(pair).turn().state in ENDS:
                    break
            except Fenced:
                alone += 1
        assert made.check() == "done" and alone


@pytest.mark.parametrize("seeds", [range(1), MANY], ids=["few", "many"])
def test_a_clock_that_jumps(seeds):
    "An hour to and fro, for the engine and for the target, which waits for the gateway's proxies by the same clock"
    for seed in seeds:
        made, rng = rolled("good", deadline=10_000, prepare=10_000, settle=10_000)[0], random.Random(seed)
        made.world.target.clock, engine = made.clock.now, made.engine()
        made.world.target.settings = made.world.target.settings.model_copy(update={"propagation": 2, "idle": 2})
        for _ in range(1500):
            made.clock.time = max(1000.0, made.clock.time + rng.choice([0, 1, 1, 1, 1, 1, -3600, 3600]))
            if engine.turn().state in ENDS:
                break
        made.clock.time += 3600
        assert made.check() == "done", seed


def test_going_back_takes_what_is_ready_first():
    "One of three pods of the stable version is ready: it takes the traffic from the broken one, the rest follows"
    made, _ = rolled("silent", replicas=3, deadline=600)
    engine, nurse = made.engine(), made.world.nurse
    while made.store.load("toy").state != "analysing":
        engine.turn()
    pods = sorted(k for k in made.world.cluster.objects if k[0] == "pods" and "m-3" in k[2])
    inner, nurse.pod = nurse.pod, lambda pod: None if pod["metadata"]["name"] in [k[2] for k in pods[1:]] else inner(pod)
    for key in pods[1:]:
        for condition in made.world.cluster.objects[key]["status"]["conditions"]:
            condition["status"] = "False"
    made.world.cluster.settle()
    assert made.world.target.ready(OLD).state == "waiting" and made.world.target.ready(OLD).up == 1
    made.store.wish("toy", "abort", "ada")
    for _ in range(4):
        engine.turn()
    assert {r["name"]: r["weight"] for r in made.world.route()["spec"]["rules"][-1]["backendRefs"]}["toy-m-3-aa11bb22"] == 100
    nurse.pod = inner
    made.world.cluster.settle()
    engine.run()
    assert made.check() == "rolled_back"


def test_pods_that_an_autoscaler_added_stay():
    "Somebody else makes the stable version eight pods: no step of the rollout takes them away, until the version ends"
    made, _ = rolled(replicas=1)
    engine, path = made.engine(), "/apis/apps/v1/namespaces/models/deployments/toy-m-3-aa11bb22"
    found = made.world.send("GET", path, {}, None)[2]
    assert made.world.send("PUT", path, {}, {**found, "spec": {**found["spec"], "replicas": 8}})[0] == 200
    assert made.world.target.size(OLD) == 8
    while (state := made.store.load("toy").state) != "retiring":
        assert made.world.replicas("3") == 8, state
        engine.turn()
        made.clock.sleep(1)
    engine.run()
    assert made.check() == "done"


@pytest.mark.parametrize("state", ["preparing", "setting", "analysing", "retiring"])
def test_a_rollout_without_an_engine_is_taken_back_by_whoever_watches(state):
    "The engine's pod is lost; after `max_unattended` the guard's one ends the rollout, not before"
    made, _ = rolled("good")
    engine = made.engine()
    while made.store.load("toy").state != state:
        engine.turn()
        made.clock.sleep(1)
    made.clock.sleep(20)
    assert rescue(made.engine("watcher")) is None
    made.clock.sleep(40)
    assert rescue(made.engine("watcher")).state == ("done" if state == "retiring" else "rolled_back")
    made.check()


def test_an_engine_that_slept_in_the_middle_of_a_write_loses():
    "Between its reading of the route and its write, another one takes over"
    made, faults = rolled()
    slow, target = made.engine(), made.world.target
    while made.store.load("toy").state != "analysing":
        slow.turn()
    fence, done = slow.fence, []

    def meanwhile(at):
        if faults.calls[-1][0] == "PUT" and not done:
            done.append(at)
            target.ensure(OLD, 1, fence + 1)
    faults.before = meanwhile
    with pytest.raises(Fenced):
        target.route(Routes({"4": 100}, fence=fence))
    assert target.routed().weights == {"3": 50, "4": 50} and done
    for call in (lambda: target.ensure(NEW, 5, fence), lambda: target.remove(NEW, fence)):
        with pytest.raises(Fenced):
            call()


def meddle(made, weights):
    route = made.world.route()
    route["spec"]["rules"][-1]["backendRefs"] = [{"name": n, "port": 8080, "weight": w} for n, w in weights.items()]
    assert made.world.send("PUT", f"{ROUTES}/toy", {}, route)[0] == 200


def test_a_route_changed_by_hand_is_put_right():
    made, _ = rolled("silent")
    engine = made.engine()
    while made.store.load("toy").state != "analysing":
        engine.turn()
    meddle(made, {"toy-m-3-aa11bb22": 1, "toy-m-4-dd33ee44": 99})
    engine.turn()
    assert made.world.target.routed().weights == {"3": 50, "4": 50}


@pytest.mark.parametrize("how", ["waiting", "failed"])
def test_ready_then_dead(how):
    made, _ = rolled("silent", deadline=600)
    engine = made.engine()
    while made.store.load("toy").state != "analysing":
        engine.turn()
    made.world.break_("4", how)
    engine.run()
    assert made.check() == "rolled_back"


def test_the_gateway_is_away():
    "Weights that no gateway takes are taken back, and the rollout ends when the gateway is there again"
    made, _ = rolled(settle=5, prepare=5)
    engine = made.engine()
    while made.store.load("toy").state != "setting":
        engine.turn()
    made.world.nurse.gateway = False
    for _ in range(40):
        engine.turn()
        made.clock.sleep(1)
    assert made.store.load("toy").state == "rolling_back"
    assert made.world.route()["spec"]["rules"][-1]["backendRefs"][0]["weight"] == 100
    made.world.nurse.gateway = True
    made.world.cluster.settle()
    engine.run()
    assert made.check() == "rolled_back"


def test_the_deployment_deleted_by_hand_comes_back():
    made, _ = rolled()
    engine = made.engine()
    while made.store.load("toy").state != "setting":
        engine.turn()
    made.world.send("DELETE", "/apis/apps/v1/namespaces/models/deployments/toy-m-4-dd33ee44", {}, None)
    engine.run()
    assert made.check() == "done"
