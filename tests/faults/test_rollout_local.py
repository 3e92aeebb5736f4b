"""Rollouts through a real Envoy, with real processes kept by a real supervisor, under load: nothing is dropped."""
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from versions import bundles, empty_store, made, root  # noqa: F401  (fixtures)
from waiting import until

from mlops_nb.audit import verify
from mlops_nb.core import MlopsError
from mlops_nb.rollout.access_log import read_lines
from mlops_nb.rollout.envoy import Gateway
from mlops_nb.rollout.local import read_state
from mlops_nb.rollout.platform import down, rotate, status, up
from mlops_nb.rollout.ports import Routes
from mlops_nb.rollout.processes import Supervisor, alive
from mlops_nb.rollout.run import Rollout, gate
from mlops_nb.rollout.strategies import make_spec
from mlops_nb.rollout.view import report_html
from mlops_nb.serving.client import Client

_spec = importlib.util.spec_from_file_location("rollout_parts", Path(__file__).parents[1] / "rollout" / "parts.py")
parts = importlib.util.module_from_spec(_spec)
sys.modules["rollout_parts"] = parts
_spec.loader.exec_module(parts)
NEW, OLD, Load, Toys = parts.NEW, parts.OLD, parts.Load, parts.Toys
FAST = {"interval": 0.1, "bake": 0.5, "drain": 0.5, "min_requests": 30}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    "A platform that serves version 3"
    with Toys(tmp_path_factory.mktemp("toys") / "my toys") as toys:
        yield toys


@pytest.fixture
def toys(shared):
    "The shared platform, back on version 3 alone"
    for path in shared.faults.glob("*.json"):
        path.unlink()
    target = shared.rollout().target
    fence = read_state(shared.folder)["fence"]
    target.ensure(OLD, 1, fence)
    until(lambda: target.ready(OLD).state == "ready")
    target.route(Routes({"3": 100}, fence=fence))
    until(lambda: (target.routed() or Routes({"0": 100})).weights == {"3": 100})
    for r in target.revisions():
        if r != OLD:
            target.remove(r, fence)
    until(lambda: sorted(n[:3] for n in Supervisor(shared.folder).states() if n.startswith("m-")) == ["m-3"] or target.ensure(OLD, 1, fence))
    return shared


def retried(toys, since):
    "Requests that Envoy sent a second time: failures that clients did not see"
    time.sleep(0.5)
    return [line for line in read_lines(toys.folder / "access.log", since, time.time()) if line.attempts > 1]


def test_a_good_canary_is_promoted_and_no_request_fails(toys):
    rollout, began = toys.rollout(), time.time()
    with Load(toys.port, rate=150) as load:
        rollout.start(NEW, make_spec(steps=[10, 50, 100], **FAST))
        assert rollout.run().state == "done"
    told = rollout.status()
    assert (told["state"], told["weights"], told["stable"], told["candidate"], told["verdict"]["action"]) == ("done", {"4": 100}, "3", "4", "promote")
    assert not load.failed and not retried(toys, began) and load.seen["4"] > 30
    assert rollout.pointer.version == "4" and [r.version for r in rollout.target.revisions()] == ["4"]
    assert verify(rollout.store.engine)["ok"]


def test_a_sabotaged_canary_is_rolled_back_before_many_requests_have_failed(toys):
    rollout = toys.rollout()
    with Load(toys.port, rate=200) as load:
        rollout.start(NEW, make_spec(steps=[10, 50, 100], **{**FAST, "min_requests": 300}))
        record = rollout.run(lambda record, text: toys.misbehave("4", errors=0.3) if record.state == "settling" else None)
        ended, seen = time.time(), load.total
        until(lambda: load.total > seen + 50)
    assert record.state == "rolled_back" and sum(b["candidate"]["errors"] for b in record.blocks[:-1]) < 30       # with more it would have gone back a look before
    assert load.failed and not load.failed_since(ended) and {version for _, _, version in load.failed} == {"4"}
    assert rollout.pointer.version == "3" and rollout.target.routed().weights == {"3": 100} and [r.version for r in rollout.target.revisions()] == ["3"]


def test_a_canary_that_refuses_more_than_the_stable_version_is_rolled_back(toys):
    "No error and no slow answer: three of ten callers get 400 where the stable version answers all; the page and the status say so"
    rollout = toys.rollout(judge=gate)
    with Load(toys.port, rate=200) as load:
        rollout.start(NEW, make_spec(steps=[50, 100], **{**FAST, "min_requests": 300}))
        record = rollout.run(lambda record, text: toys.misbehave("4", refuse=0.3) if record.state == "settling" else None)
    assert record.state == "rolled_back" and "refuses more requests" in record.reason, record.reason
    assert load.failed and {(status, version) for _, status, version in load.failed} == {(400, "4")}
    arms = rollout.status()["arms"]
    assert arms["candidate"]["refused"] > 0 and (arms["candidate"]["errors"], arms["stable"]["refused"]) == (0, 0)
    page = report_html(record, [])
    assert "more refused requests" in page and ("refused so far" in page) == (len(record.blocks) > 1)                # a busy machine may have seen enough in one look, which is no line


@pytest.mark.drill
def test_one_caller_who_sends_nonsense_sends_no_version_back(toys):
    "Callers are sticky, and the one whom both versions refuse belongs to the candidate: hundreds of refusals, and one observation; the step ends undecided, and a person promotes"
    rollout = toys.rollout(judge=gate)
    target, fence = rollout.target, read_state(toys.folder)["fence"]
    for version in "34":
        toys.misbehave(version, unknown="age")
    target.ensure(NEW, 1, fence)
    until(lambda: target.ready(NEW).state == "ready")
    target.route(Routes({"3": 50, "4": 50}, sticky="x-user-id", fence=fence))
    until(lambda: target.routed().weights.get("4") == 50)

    def falls_to(caller):
        with Load(toys.port, clients=1, headers={"x-user-id": caller}) as load:
            until(lambda: load.seen)
        return max(load.seen, key=load.seen.get)
    odd = next(c for c in map("odd{}".format, range(50)) if falls_to(c) == "4")
    target.route(Routes({"3": 100}, fence=fence))
    with Load(toys.port, clients=12, rate=100) as load, Load(toys.port, clients=1, rate=30, headers={"x-user-id": odd}, body=b'{"rows": [{"age": 1}]}') as nonsense:
        rollout.start(NEW, make_spec(strategy="ab", **{**FAST, "deadline": 8}))
        record = rollout.run()
        assert record.state == "paused" and "too little evidence" in record.reason, record.reason
        refused, callers = (sum(b["candidate"].get(k, 0) for b in record.blocks) for k in ("refused", "refused_callers"))
        assert refused > 50 and callers <= 1 and len(nonsense.failed) > 50
        rollout.store.wish("toy", "promote", "ada", "one caller is wrong")
        assert rollout.run().state == "done"
    assert not load.failed


@pytest.mark.drill
def test_a_broken_candidate_never_gets_a_request(toys):
    toys.misbehave("4", broken=True)
    rollout = toys.rollout()
    with Load(toys.port, rate=50) as load:
        rollout.start(NEW, make_spec(steps=[50, 100], **FAST, prepare=60))
        record = rollout.run()
    assert record.state == "rolled_back" and "cannot load the model" in record.reason
    assert not load.failed and set(load.seen) == {"3"}


@pytest.mark.drill
def test_a_candidate_that_gets_slow_and_then_dies_is_rolled_back(toys):
    "Whatever is noticed first, only requests that it had are lost"
    def tell(record, text):
        if record.state == "analysing":
            toys.misbehave("4", delay=0.5, die=0.2)
    rollout = toys.rollout()
    with Load(toys.port, rate=100) as load:
        rollout.start(NEW, make_spec(steps=[50, 100], **{**FAST, "min_requests": 10**6}, unready=3))
        assert rollout.run(tell).state == "rolled_back"
        ended, seen = time.time(), load.total
        until(lambda: load.total > seen + 50)
    assert not load.failed_since(ended) and {status for _, status, _ in load.failed} <= {503} and {version for _, _, version in load.failed} <= {"4", None}


@pytest.mark.drill
def test_the_stable_version_dies_during_the_canary(toys):
    "Its server is killed again and again until supervisor gives it up: the candidate takes its share meanwhile; when it is back the rollout can be taken back to it"
    rollout = toys.rollout()
    engine = rollout.engine()
    rollout.start(NEW, make_spec(steps=[50, 100], **{**FAST, "min_requests": 10**6}, on_pause="hold", max_unattended=600))      # or the watcher would take it back while it is watched here
    while engine.turn().state != "analysing":
        time.sleep(0.1)
    toys.misbehave("3", broken=True)
    (name, found), = [(n, s) for n, s in Supervisor(toys.folder).states().items() if n.startswith("m-3")]
    os.kill(found["pid"], signal.SIGKILL)
    until(lambda: Supervisor(toys.folder).states()[name]["state"] == "fatal")
    until(lambda: rollout.target.routed().weights.get("4") == 100)
    with Load(toys.port, rate=100) as load:
        until(lambda: load.total > 100)
        assert not load.failed and set(load.seen) == {"4"}
        rollout.store.wish("toy", "abort", "ada")
        for _ in range(10):
            assert engine.turn().state == "rolling_back"                      # nowhere to go back to: it holds, and says so
        assert load.failed == [] and rollout.target.routed().weights.get("4") == 100
        (toys.faults / "3.json").unlink()
        assert engine.run().state == "rolled_back"
        seen = load.total
        until(lambda: load.total > seen + 50)
    assert not load.failed and rollout.target.routed().weights == {"3": 100}


@pytest.mark.drill
def test_a_killed_pool_loses_its_weight_and_comes_back(toys):
    rollout = toys.rollout()
    target, fence = rollout.target, read_state(toys.folder)["fence"]
    target.ensure(NEW, 1, fence)
    until(lambda: target.ready(NEW).state == "ready")
    target.route(Routes({"3": 50, "4": 50}, fence=fence))
    until(lambda: target.routed().weights == {"3": 50, "4": 50})
    toys.misbehave("4", unready=True)
    until(lambda: target.routed().weights == {"3": 100})
    with Load(toys.port, rate=100) as load:
        until(lambda: load.total > 50)
    assert not load.failed and set(load.seen) == {"3"}
    toys.misbehave("4")
    until(lambda: target.routed().weights == {"3": 50, "4": 50})
    (name, found), = [(n, s) for n, s in Supervisor(toys.folder).states().items() if n.startswith("m-4")]
    os.kill(found["pid"], signal.SIGKILL)
    until(lambda: Supervisor(toys.folder).states()[name]["pid"] not in (0, found["pid"]))
    until(lambda: target.ready(NEW).state == "ready" and target.routed().weights == {"3": 50, "4": 50})
    assert not alive(found["pid"])


@pytest.mark.drill
def test_callers_stay_with_their_version_and_move_once(toys):
    rollout = toys.rollout()
    target, fence = rollout.target, read_state(toys.folder)["fence"]
    target.ensure(NEW, 1, fence)
    until(lambda: target.ready(NEW).state == "ready")
    import http.client
    connection, before = http.client.HTTPConnection("127.0.0.1", toys.port), {}

    def version(user):
        connection.request("POST", "/predict", b"{}", {"x-user-id": user})
        answer = connection.getresponse()
        answer.read()
        return answer.getheader("x-model-version")

    for share in (10, 30, 60):
        target.route(Routes({"3": 100 - share, "4": share}, sticky="x-user-id", fence=fence))
        until(lambda share=share: target.routed().weights.get("4") == share)
        now = {f"user{i}": version(f"user{i}") for i in range(200)}
        assert now == {u: version(u) for u in now}
        assert not [u for u in now if before.get(u) == "4" and now[u] == "3"]
        assert abs(sum(v == "4" for v in now.values()) / 2 - share) < 12
        before = now


def test_a_shadow_sees_copies_and_answers_nobody(toys):
    rollout, began = toys.rollout(), time.time()
    copies = lambda: sum(line.listener == "mirror" for line in read_lines(toys.folder / "access.log", began, time.time()))
    with Load(toys.port, rate=100) as load:
        rollout.start(NEW, make_spec(strategy="shadow", **FAST))
        record = rollout.run()
    assert record.state == "done" and rollout.pointer.version == "3" and set(load.seen) == {"3"} and not load.failed
    stable, shadow = (sum(b[arm]["requests"] for b in record.blocks) for arm in ("stable", "candidate"))
    until(lambda: copies() > 0.8 * stable - 10)                                     # a copy may be answered, and written down, later than its original
    assert 30 <= shadow <= copies() <= load.total


@pytest.mark.parametrize("how", ["full", "removed"])
def test_a_log_that_is_full_or_removed_is_begun_anew(toys, how):
    "One log before the new one is kept; who removes both, for the callers' sake, is not left with a gateway that writes where nobody reads"
    log, before = toys.folder / "access.log", toys.folder / "access.log.1"
    with Load(toys.port, rate=100) as load:
        until(lambda: log.exists() and log.stat().st_size)
        first = log.stat().st_ino
        if how == "full":
            rotate(toys.folder, most=1)
        else:
            for path in (log, before):
                path.unlink(missing_ok=True)
        until(lambda: log.exists() and log.stat().st_size)                           # the watcher sees to what was removed
    assert not load.failed and (how == "removed" or before.stat().st_ino == first)
    assert before.exists() == (how == "full")


def test_an_older_engine_cannot_move_traffic(toys):
    rollout = toys.rollout()
    fence = read_state(toys.folder)["fence"]
    rollout.target.route(Routes({"3": 100}, fence=fence + 1))
    with pytest.raises(MlopsError, match="has seen fence"):
        rollout.target.route(Routes({"3": 100}, fence=fence))
    until(lambda: rollout.target.routed().fence == fence + 1)


@pytest.mark.drill
@pytest.mark.parametrize("spoilt", ["{", "[]", '{"version_info": "x", "resources": []}', '{"version_info": "1", "resources": [{"name": "main"}]}'])
def test_a_file_of_routes_that_somebody_spoilt_is_put_right(toys, spoilt):
    "Envoy keeps what it had, and weights still move"
    target, path = toys.rollout().target, toys.folder / "xds" / "main.json"
    fence = read_state(toys.folder)["fence"]
    target.ensure(NEW, 1, fence)
    until(lambda: target.ready(NEW).state == "ready")
    with Load(toys.port, rate=50) as load:
        path.with_suffix(".new").write_text(spoilt)
        path.with_suffix(".new").replace(path)
        until(lambda: load.total > 20)
        target.route(Routes({"3": 50, "4": 50}, fence=fence))
        until(lambda: target.routed().weights == {"3": 50, "4": 50})
        until(lambda: load.seen.get("4", 0) > 5)
        target.route(Routes({"3": 100}, fence=fence))
        until(lambda: target.routed().weights == {"3": 100})
    assert not load.failed


def test_weight_changes_under_load(toys, changes=11):
    rollout, began = toys.rollout(), time.time()
    target, fence = rollout.target, read_state(toys.folder)["fence"]
    target.ensure(NEW, 1, fence)
    until(lambda: target.ready(NEW).state == "ready")
    with Load(toys.port, clients=8, rate=300) as load:
        for i in range(changes):
            share = (0, 100, 5, 50, 95)[i % 5] # the last one is 0: all to the old version again
            target.route(Routes({"3": 100 - share, "4": share}, fence=fence))
            until(lambda share=share: target.routed().same(Routes({"3": 100 - share, "4": share})))
            seen = load.total
            until(lambda seen=seen: load.total > seen + 30)
    assert not load.failed and not retried(toys, began)


@pytest.mark.drill
def test_fifty_weight_changes_and_rollouts_of_every_strategy_drop_nothing(toys):
    test_weight_changes_under_load(toys, 51)
    began, now, other = time.time(), OLD, NEW
    with Load(toys.port, clients=8, rate=200) as load:
        for strategy in ("canary", "blue-green", "rolling", "ab", "shadow") * 4:
            rollout = toys.rollout(now.version)
            options = {"steps": [10, 50, 100]} if strategy == "canary" else {"replicas": 2} if strategy == "rolling" else {}
            rollout.start(other, make_spec(strategy=strategy, **FAST, **options))
            assert rollout.run().state == "done", strategy
            if strategy != "shadow":
                now, other = other, now
        until(lambda: load.total > 5000)
    assert not load.failed and not retried(toys, began)


@pytest.mark.drill
def test_keys_limits_and_a_taken_port(tmp_path):
    keys = tmp_path / "keys.yaml"
    keys.write_text("ada: 0123456789abcdef\nbob: fedcba9876543210\n")
    with Toys(tmp_path / "p", gateway={"keys": str(keys), "limit": 20}) as toys:
        ask = lambda **headers: Load(toys.port, clients=4, rate=4000, headers={k.replace("_", "-"): v for k, v in headers.items()})
        with ask() as nobody:
            until(lambda: nobody.total > 3)
        assert {s for _, s, _ in nobody.failed} == {401} and not nobody.seen
        with ask(x_api_key="0123456789abcdef") as ada:
            until(lambda: ada.total > 60 and ada.failed)
        assert ada.seen["3"] >= 20 and {s for _, s, _ in ada.failed} == {429}
        with ask(x_api_key="fedcba9876543210") as bob:
            until(lambda: bob.total > 3)
        assert bob.seen["3"] > 3
        with Client(f"http://127.0.0.1:{toys.port}", "fedcba9876543210") as client:
            assert client.request("POST", "/predict", {})["version"] == "3"
        import urllib.request
        with urllib.request.urlopen(f"http://127.0.0.1:{toys.port}/ready") as answer:
            assert answer.status == 200
        with pytest.raises(MlopsError, match="cannot listen there"):
            up(tmp_path / "q", "toy", Gateway(port=toys.port), revision=OLD)
        told = status(toys.root)
        assert told["running"] and told["weights"] == {"3": 100} and json.dumps(told)
        with pytest.raises(MlopsError, match="runs already, with another limit"):
            up(toys.root, "toy", Gateway(port=toys.port, limit=99), revision=OLD)
        up(toys.root, "toy", revision=OLD, example=lambda r: {})                      # nothing else is asked for
        assert "0123456789abcdef" not in json.dumps(told)


@pytest.fixture
def boarding(root, bundles, monkeypatch):  # noqa: F811
    "A project with two registered versions whose servers are toys, and what starts its platform and gives its port"
    from mlops_nb.registry import register
    monkeypatch.chdir(root)
    toys = Toys(root)
    for bundle in bundles[:2]:
        register(bundle, root=root)
    command = [sys.executable, str(Path(parts.__file__).with_name("toy_server.py")), "{version}", "{port}", str(toys.faults)]

    def start(text, **options):
        (root / "params.yaml").write_text(text)
        told = up(root, "boarding", Gateway(port=0), command=command, example=lambda r: {}, seconds=180, **options)
        return int(told["gateway"].rsplit(":", 1)[1])
    yield SimpleNamespace(root=root, toys=toys, start=start)
    down(root, drain=1)


def params(more=""):
    "params.yaml of that project; how fast servers answer on a busy machine takes nothing back there"
    return f"base: {{name: boarding}}\nrollout: {{drain: 0.5, policy: {{alone_slow: 0.99}}{more}}}\n"


def cli(root, *words):  # noqa: F811
    "A command, in a process of its own"
    return subprocess.run([sys.executable, "-c", "from mlops_nb.cli import main; main()", *words], cwd=root, capture_output=True, text=True)


@pytest.mark.drill
def test_a_version_that_goes_bad_after_promotion_is_taken_back(boarding):
    "The guard as a command, with a real registry: version 2 is served and fails; it goes back to version 1, the registry and the alerts say why, and no request is lost to the way back"
    from mlops_nb.audit import events, open_state
    from mlops_nb.core import state_url
    from mlops_nb.registry import promote, served
    home, guard = boarding.root, lambda: cli(boarding.root, "rollout", "guard", "--json")
    promote("boarding", 2, "ada", "better", root=home)
    with Load(boarding.start(params(", guard: {min_age: 0, every: 1}"), replicas=2), rate=100) as load:
        until(lambda: load.total > 200)
        first = guard()
        assert first.returncode == 0 and not load.failed, first.stderr
        boarding.toys.misbehave("2", errors=0.2)
        until(lambda: guard().returncode == 2 or served("boarding", root=home)["version"] == 1, 300) # the platform's own guard may be first
        until(lambda: served("boarding", root=home)["version"] == 1, 200)
        rollout = Rollout(home)
        assert rollout.wait(120).state == "done"
        ended, seen = time.time(), load.total
        until(lambda: load.total > seen + 200)
    assert not load.failed_since(ended) and {version for _, _, version in load.failed} == {"2"}
    assert rollout.store.load("boarding").spec["replicas"] == 2                       # as many servers as the version before had
    actions = {(e["action"], e["actor"]): e["reason"] for e in events(open_state(state_url(home)))}
    assert "error rate" in actions["rollout pending", "guard"] and ("rolled_back", "rollout engine") in actions
    assert "boarding/2" in actions["alerted", "alerting"]
    assert [a["version"] for a in json.loads(cli(home, "alerts", "list", "--json").stdout)] == ["2"]
    assert guard().returncode == 0                                                    # version 1 has done nothing wrong
    assert json.loads(cli(home, "alerts", "list", "--json").stdout) == []             # and version 2 has no traffic any more


@pytest.mark.drill
def test_a_platform_taken_down_pauses_its_rollout_which_goes_on_after_up(boarding):
    "No engine is left behind to ask a gateway that is gone; `up` brings both versions back with their shares, `resume` finishes"
    home, text = boarding.root, params(", interval: 0.1, bake: 0.5, min_requests: 100")
    boarding.start(text)
    rollout = Rollout(home)
    begun = cli(home, "rollout", "start", "--to", "2", "--steps", "20,100")
    assert begun.returncode == 0, begun.stderr
    until(lambda: rollout.status()["state"] == "analysing")
    told = cli(home, "down")
    assert told.returncode == 0 and "is paused" in told.stdout, told.stderr
    until(lambda: not rollout.driven())
    assert rollout.store.load("boarding").state == "paused"
    with Load(boarding.start(text), rate=150) as load:
        assert status(home)["weights"] == {"1": 80, "2": 20}
        assert cli(home, "rollout", "resume").returncode == 0
        until(lambda: rollout.status()["state"] == "done")
    assert not load.failed and status(home)["weights"] == {"2": 100}


@pytest.mark.drill
def test_what_the_registry_is_told_reaches_the_traffic(boarding):
    "`registry promote` and `rollback` move traffic and pointer together while the platform runs; `up` again follows a pointer that was moved behind its back; no request fails"
    from mlops_nb.registry import promote, served
    home, registry = boarding.root, lambda *words: cli(boarding.root, "registry", *words)
    stands = lambda: (status(home)["weights"], served("boarding", root=home)["version"])
    with Load(boarding.start(params()), rate=100) as load:
        until(lambda: load.total > 100)
        done = registry("promote", "2", "--reason", "better")
        assert done.returncode == 0 and "is the champion" in done.stdout and stands() == ({"2": 100}, 2), done.stderr
        done = registry("rollback", "--reason", "complaints")
        assert done.returncode == 0 and "back to version" in done.stdout and stands() == ({"1": 100}, 1), done.stderr
        assert registry("rollback").returncode == 1                                   # there is nothing before version 1
        boarding.toys.misbehave("2", errors=1.0)
        done = registry("promote", "2")
        assert done.returncode == 1 and "rolled_back" in done.stderr and stands() == ({"1": 100}, 1)
        (boarding.toys.faults / "2.json").unlink()
        promote("boarding", 2, "ada", "behind the platform's back", root=home)
        assert up(home, "boarding", example=lambda r: {}, seconds=180)["weights"] == {"2": 100}
        seen = load.total
        until(lambda: load.total > seen + 100)
    assert not load.failed                                                            # the broken one was asked by the smoke test alone


@pytest.mark.drill
def test_a_version_that_callers_cannot_go_back_from_is_left_to_a_person(boarding, tmp_path):
    "Version 3 has an input more and goes bad; going back would have every caller refused: neither the guard nor `registry rollback` does it unsaid, and with --breaking it is done although all are refused"
    from mlops_nb.audit import events, open_state
    from mlops_nb.core import state_url
    from mlops_nb.registry import promote, register, served
    home, registry = boarding.root, lambda *words: cli(boarding.root, "registry", *words)
    stands = lambda: (status(home)["weights"], served("boarding", root=home)["version"])
    register(made(tmp_path, "more", 4, ["age"])[0], root=home)
    promote("boarding", 3, "ada", "breaking", root=home)
    for version in "12":
        boarding.toys.misbehave(version, unknown="age")
    with Load(boarding.start(params(", guard: {min_age: 0, every: 1}")), rate=100, body=b'{"rows": [{"age": 1}]}') as load:
        until(lambda: load.total > 100)
        boarding.toys.misbehave("3", errors=0.3)
        told = until(lambda: (said := cli(home, "rollout", "guard", "--json")).returncode == 2 and json.loads(said.stdout), 300)
        assert (told["target"], told["rollout"]) == (None, None) and "version 1: it does not go with what callers of version 3 send: input 'age' is refused" in told["said"]
        no = registry("rollback", "--reason", "errors")
        assert no.returncode == 1 and "'age' is refused" in no.stderr and "--breaking" in no.stderr and stands() == ({"3": 100}, 3)
        done = registry("rollback", "--reason", "they change tonight", "--breaking")
        assert done.returncode == 0 and stands() == ({"1": 100}, 1), done.stderr
        until(lambda: load.failed[-1][1:] == (400, "1"))
    assert "input 'age' is refused" in events(open_state(state_url(home)), action="rolled_back")[-1]["evidence"]["breaking"]


@pytest.mark.soak
@pytest.mark.drill
def test_the_demo_and_the_tutorial_do_what_they_say(bundles, tmp_path):  # noqa: F811
    "A good version promoted and a sabotaged one taken back, as a command and as a notebook with its own assertions"
    shown = subprocess.run([sys.executable, "-c", "from mlops_nb.cli import main; main()", "rollout", "demo", str(bundles[0].path)], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout[-2000:] + shown.stderr[-2000:]
    assert "done: " in shown.stdout and "rolled back: " in shown.stdout
    book = Path(__file__).parents[2] / "nbs/tutorials/roll_out_a_model.ipynb"
    told = subprocess.run([sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", str(book), "--output-dir", str(tmp_path)], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-2000:]
