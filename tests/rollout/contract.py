"What every target must do, in memory, on the small API server and on the real one; `world` has target, break_(version, how), until(condition)."
import pytest

from mlops_nb.rollout.ports import Fenced, Revision, Routes

OLD, NEW = Revision("3", "models:/toy/3", "aa11bb22cc"), Revision("4", "models:/toy/4", "dd33ee44ff")


def started(world, fence=1):
    "Both versions ready, the old one with all traffic"
    target = world.target
    for r in (OLD, NEW):
        target.ensure(r, 1, fence)
    for r in (OLD, NEW):
        world.until(lambda r=r: target.ready(r).state == "ready")
    target.route(Routes({"3": 100}, fence=fence))
    world.until(lambda: target.routed() is not None)
    return target


def check_nothing_is_there_at_first(world):
    assert world.target.revisions() == [] and world.target.routed() is None
    assert world.target.ready(OLD).state == "waiting"
    world.target.remove(OLD, 1)


def check_versions_get_ready_and_are_known(world):
    target = started(world)
    assert sorted(target.revisions(), key=lambda r: r.version) == [OLD, NEW]


def check_replicas_change(world):
    target = started(world)
    for n in (3, 1):
        target.ensure(NEW, n, 1)
        target.ensure(NEW, n, 1)
        world.until(lambda: target.ready(NEW).state == "ready")
        assert world.replicas("4") == n


def check_a_version_that_does_not_get_ready(world):
    world.break_("4", "waiting")
    world.target.ensure(NEW, 1, 1)
    assert world.target.ready(NEW).state == "waiting"
    world.break_("4", "failed")
    world.until(lambda: world.target.ready(NEW).state == "failed")


def check_ready_then_dead(world):
    target = started(world)
    world.break_("4", "waiting")
    world.until(lambda: target.ready(NEW).state == "waiting")
    assert target.ready(OLD).state == "ready"


def check_traffic_is_divided_as_told(world):
    target = started(world)
    for routes in (Routes({"3": 90, "4": 10}, fence=1), Routes({"3": 100, "4": 0}, {"4": 50}, fence=2), Routes({"3": 0, "4": 100}, fence=2), Routes({"3": 100}, fence=3)):
        target.route(routes)
        target.route(routes)
        world.until(lambda routes=routes: routes.same(target.routed()))
        assert target.routed().fence == routes.fence


def check_a_lower_fence_is_refused_everywhere(world):
    target = started(world, fence=5)
    for call in (lambda: target.route(Routes({"4": 100}, fence=4)), lambda: target.ensure(OLD, 2, 4), lambda: target.remove(NEW, 4)):
        with pytest.raises(Fenced):
            call()
    assert target.routed().weights.get("3") == 100 and len(target.revisions()) == 2


def check_a_new_engine_raises_the_fence_with_its_first_call(world):
    target = started(world, fence=5)
    target.ensure(OLD, 1, 6)
    with pytest.raises(Fenced):
        target.route(Routes({"4": 100}, fence=5))


def check_drained_and_removed(world):
    target = started(world)
    target.route(Routes({"3": 50, "4": 50}, fence=1))
    world.until(lambda: target.routed() and target.routed().weights.get("4") == 50)
    assert not target.drained(NEW)
    target.route(Routes({"3": 100}, fence=1))
    world.until(lambda: target.drained(NEW))
    world.until(lambda: target.remove(NEW, 1) or target.revisions() == [OLD])
    target.remove(NEW, 1)
    assert Routes({"3": 100}).same(world.until(target.routed))


def check_a_version_comes_back(world):
    target = started(world)
    world.until(lambda: target.remove(NEW, 1) or target.revisions() == [OLD])
    target.ensure(NEW, 2, 1)
    world.until(lambda: target.ready(NEW).state == "ready")
    assert world.replicas("4") == 2


CHECKS = {name.removeprefix("check_"): check for name, check in dict(globals()).items() if name.startswith("check_")}
