"""Real SIGKILLs: of the engine's process in each state, of the gateway, the watcher and the supervisor; under load."""
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from servers import small_disk
from waiting import until

from mlops_nb.audit import verify
from mlops_nb.rollout.local import read_state
from mlops_nb.rollout.platform import status
from mlops_nb.rollout.processes import Supervisor, alive, strays
from mlops_nb.rollout.strategies import make_spec

HERE = Path(__file__).parents[1] / "rollout"
_spec = importlib.util.spec_from_file_location("rollout_parts", HERE / "parts.py")
parts = sys.modules.get("rollout_parts") or importlib.util.module_from_spec(_spec)
if "rollout_parts" not in sys.modules:
    sys.modules["rollout_parts"] = parts
    _spec.loader.exec_module(parts)
NEW, Load, Toys = parts.NEW, parts.Load, parts.Toys

ENGINE = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import parts
toys = parts.Toys(sys.argv[2])
toys.folder = parts.platform_dir(toys.root)
toys.rollout().run(lambda record, text: print(record.state, flush=True))
"""
# Kills itself when it has done what is to be done in a state and not yet written it down, once in each state
DYING = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import parts
toys = parts.Toys(sys.argv[2])
toys.folder = parts.platform_dir(toys.root)
engine = toys.rollout().engine()
save, engine.lease = engine.save, 1
def killed(record, event=None, done=None):
    if event and engine.last.state not in sys.argv[3:]:
        print(engine.last.state, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return save(record, event, done)
engine.save = killed
engine.run()
"""
pytestmark = pytest.mark.drill


def engine(toys):
    "An engine in a process of its own"
    return subprocess.Popen([sys.executable, "-c", ENGINE, str(HERE), str(toys.root)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("state", ["preparing", "smoking", "setting", "settling", "analysing", "baking", "promoting", "retiring", "rolling_back"])
def test_the_engine_killed_in_each_state_is_finished_by_another(tmp_path, state):
    with Toys(tmp_path) as toys:
        rollout = toys.rollout()
        with Load(toys.port, rate=100) as load:
            rollout.start(NEW, make_spec(steps=[50, 100], interval=0.1, bake=0.5, drain=0.5, min_requests=30))
            if state == "rolling_back":
                rollout.store.wish("toy", "abort", "ada")
            process = engine(toys)
            for line in process.stdout:
                if line.strip() == state:
                    break
            process.kill()
            process.wait()
            before = rollout.store.load("toy")
            time.sleep(0.5)
            until(lambda: not rollout.driven())
            record = rollout.run()
        assert record.state == ("rolled_back" if state == "rolling_back" else "done") and before.fence < record.fence
        assert not load.failed
        winner = "3" if state == "rolling_back" else "4"
        assert rollout.target.routed().weights == {winner: 100} and [r.version for r in rollout.target.revisions()] == [winner]
        until(lambda: [n for n in Supervisor(toys.folder).states() if n.startswith("m-")] == [f"m-{winner}-{p}" for p in _ports(toys, winner)])
        assert verify(rollout.store.engine)["ok"]


WAY = ["pending", "preparing", "smoking", "setting", "settling", "analysing"]
STRATEGIES = {"ab": {}, "canary": {"steps": [50, 100]}, "blue-green": {}, "rolling": {"replicas": 2}, "shadow": {}}


def die_in_every_state(toys, rollout):
    "The states in which an engine was killed, one engine after the other, until the rollout rests"
    died = []
    while True:
        until(lambda: not rollout.driven())
        done = subprocess.run([sys.executable, "-c", DYING, str(HERE), str(toys.root), *died], stdout=subprocess.PIPE, text=True)
        if done.returncode == 0:
            return died
        assert done.returncode == -signal.SIGKILL
        died.append(done.stdout.strip())


@pytest.mark.parametrize("strategy", [s if s == "ab" else pytest.param(s, marks=pytest.mark.soak) for s in STRATEGIES])
def test_killed_between_the_deed_and_its_record_in_each_state(tmp_path, strategy):
    "Every strategy loses its engine once in every state, when the processes and weights are changed and the record is not; then once more while it is paused and taken back"
    with Toys(tmp_path) as toys:
        rollout = toys.rollout()
        with Load(toys.port, clients=12, rate=100) as load:
            rollout.start(NEW, make_spec(strategy=strategy, **{"interval": 0.1, "bake": 0.5, "drain": 0.5, "min_requests": 30, "max_unattended": 120, **STRATEGIES[strategy]}))
            assert die_in_every_state(toys, rollout) == [*WAY, *([] if strategy == "shadow" else ["baking", "promoting"]), "retiring"]
            assert rollout.store.load("toy").state == "done"
            winner, other = ("3", NEW) if strategy == "shadow" else ("4", parts.OLD)
            rollout.start(other, make_spec(strategy=strategy, interval=0.1, min_requests=10**6, drain=0.5, max_unattended=120, on_pause="stable"))
            rollout.store.wish("toy", "pause", "ada")
            assert die_in_every_state(toys, rollout) == ["pending", "pausing"] and rollout.store.load("toy").state == "paused"
            rollout.store.wish("toy", "abort", "ada")
            assert die_in_every_state(toys, rollout) == ["paused", "rolling_back"] and rollout.store.load("toy").state == "rolled_back"
        assert not load.failed, load.failed[:5]
        assert rollout.target.routed().weights == {winner: 100} and [r.version for r in rollout.target.revisions()] == [winner]
        assert verify(rollout.store.engine)["ok"]


def _ports(toys, version):
    "Ports that a version's servers should have"
    return read_state(toys.folder)["pools"][f"m-{version}"]["ports"]


def test_a_killed_engine_that_nobody_replaces_is_taken_back_by_the_watcher(tmp_path):
    with Toys(tmp_path) as toys:
        rollout = toys.rollout()
        with Load(toys.port, rate=100) as load:
            rollout.start(NEW, make_spec(steps=[50, 100], interval=0.1, drain=0.5, min_requests=10**6, max_unattended=12))
            process = engine(toys)
            for line in process.stdout:
                if line.strip() == "analysing":
                    break
            until(lambda: rollout.target.routed().weights == {"3": 50, "4": 50})
            process.kill()
            process.wait()
            until(lambda: rollout.store.load("toy").state == "rolled_back")
        assert rollout.target.routed().weights == {"3": 100} and not load.failed
        told = rollout.status()
        assert told["state"] == "rolled_back" and "watcher" in told["reason"]


def test_a_split_is_taken_back_although_the_disk_is_full(tmp_path):
    "The engine ends at the first write that fails; the watcher gives up the room it kept, and that is enough for the way back while the disk stays full"
    with small_disk(tmp_path / ".mlops_nb", "48m") as small, Toys(tmp_path) as toys:
        rollout = toys.rollout()
        with Load(toys.port, rate=50) as load:
            until((toys.folder / "spare").exists)
            rollout.start(NEW, make_spec(steps=[50, 100], interval=0.1, drain=0.5, min_requests=10**6, max_unattended=3))
            process = engine(toys)
            until(lambda: rollout.target.routed().weights == {"3": 50, "4": 50})
            with pytest.raises(OSError), (small / "ballast").open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
            until(lambda: rollout.target.routed().weights == {"3": 100})
            assert (small / "ballast").exists() and not (toys.folder / "spare").exists()
            process.wait()
        (small / "ballast").unlink()
        until(lambda: rollout.store.load("toy").state == "rolled_back")
        until((toys.folder / "spare").exists)
        assert "the disk is full" in rollout.store.load("toy").reason and not load.failed
        assert verify(rollout.store.engine)["ok"]


def test_any_process_that_is_killed_comes_back(tmp_path):
    with Toys(tmp_path, replicas=2) as toys:
        supervisor = Supervisor(toys.folder)
        for name in supervisor.states():
            pid = until(lambda name=name: supervisor.states()[name]["pid"])
            os.kill(pid, signal.SIGKILL)
            until(lambda name=name, pid=pid: supervisor.states()[name]["pid"] not in (0, pid))
        assert toys.rollout().target.ready(parts.OLD) is not None
        until(lambda: toys.rollout().target.ready(parts.OLD).state == "ready")
        with Load(toys.port, rate=50) as load:
            until(lambda: load.total > 50)
        assert not load.failed


def test_a_killed_supervisor_is_replaced_when_it_is_missed_or_asked_for(tmp_path):
    "Traffic goes on without it; once a process is missing the watcher begins anew, and `up` and `down` find what it left"
    with Toys(tmp_path) as toys:
        supervisor = Supervisor(toys.folder)

        def kill():
            os.kill(supervisor.call("getPID"), signal.SIGKILL)
            until(supervisor.killed)
            return strays(toys.folder.resolve())
        with Load(toys.port, rate=50) as load:
            left = kill()
            seen = load.total
            until(lambda: load.total > seen + 50)
        assert not load.failed and len(left) == 3
        told = status(toys.root)
        assert (told["running"], told["supervised"], told["weights"]) == (True, False, {"3": 100})
        os.kill(left["gateway"], signal.SIGKILL)
        until(lambda: (told := status(toys.root))["supervised"] and told["weights"] == {"3": 100} and told["pools"][0]["ready"] == 1)
        assert not set(left.values()) & set(strays(toys.folder.resolve()).values())
        left = kill()
        with Load(toys.__enter__().port, rate=50) as load:
            until(lambda: load.total > 50)
        assert not load.failed and not any(map(alive, left.values()))
        left = kill()
        parts.down(toys.root)
        assert not any(map(alive, left.values())) and not status(toys.root)["running"]


def test_of_two_that_start_a_platform_at_once_one_does(tmp_path):
    "The other waits and finds it there"
    from concurrent.futures import ThreadPoolExecutor
    both = [Toys(tmp_path), Toys(tmp_path)]
    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(lambda toys: toys.__enter__().status, both))
    try:
        assert told[0]["gateway"] == told[1]["gateway"] and [t["weights"] for t in told] == [{"3": 100}] * 2
        assert sorted(n[:2] for n in told[1]["processes"]) == ["ga", "m-", "wa"]
    finally:
        parts.down(tmp_path)
    assert not strays((tmp_path / ".mlops_nb/platform").resolve())


def test_a_record_that_cannot_be_read_hides_nothing_and_keeps_nobody_dead(tmp_path):
    "The status tells the rest, and the watcher does its other duties"
    import sqlite3
    with Toys(tmp_path) as toys:
        supervisor, rollout = Supervisor(toys.folder), toys.rollout()
        rollout.start(NEW, make_spec(steps=[50, 100]))
        with sqlite3.connect(tmp_path / ".mlops_nb/state.db") as db:
            db.execute("UPDATE rollouts SET record = 'x'")
        name = next(n for n in supervisor.states() if n.startswith("m-"))
        toys.misbehave("3", broken=True)                                      # given up after its fourth start
        os.kill(supervisor.states()[name]["pid"], signal.SIGKILL)
        until(lambda: supervisor.states()[name]["state"] == "fatal")
        (toys.faults / "3.json").unlink()
        until(lambda: rollout.target.ready(parts.OLD).state == "ready")
        told = status(toys.root)
        assert "damaged" in told["rollout"]["state"] and told["weights"] == {"3": 100} and told["supervised"]


def test_one_of_two_servers_killed_costs_at_most_what_was_open(tmp_path):
    with Toys(tmp_path, replicas=2) as toys:
        supervisor = Supervisor(toys.folder)
        name, found = next((n, s) for n, s in supervisor.states().items() if n.startswith("m-"))
        with Load(toys.port, clients=4, rate=100) as load:
            until(lambda: load.total > 50)
            os.kill(found["pid"], signal.SIGKILL)
            until(lambda: supervisor.states()[name]["pid"] not in (0, found["pid"]))
            seen = load.total
            until(lambda: load.total > seen + 200)
        assert len(load.failed) <= 4


def test_up_goes_on_with_a_paused_rollout(tmp_path):
    with Toys(tmp_path) as toys:
        rollout = toys.rollout()
        with Load(toys.port, rate=50):
            rollout.start(NEW, make_spec(steps=[50, 100], interval=0.1, min_requests=10**6, deadline=1))
            assert rollout.run().state == "paused"
        parts.down(toys.root)
        assert not Supervisor(toys.folder).running()
        with Toys(tmp_path) as again:
            rollout = again.rollout()
            assert rollout.target.routed().weights == {"3": 50, "4": 50}
            rollout.store.wish("toy", "abort", "ada")
            assert rollout.run().state == "rolled_back" and rollout.target.routed().weights == {"3": 100}
