"The gate, by simulation: false aborts, what is found and how soon, what is promoted. A short version always, 2,000 rollouts a setting as a drill."
import json
import math

import numpy as np
import pytest

from mlops_nb.rollout.analysis import SHARES, Block, Counts, Policy, _alone, as_good, harm, judge, lower_bound

LOOK = 50                                                        # requests to the candidate between two looks


def simulated(rng, runs, looks, p_stable, p_candidate, split, burst=None):
    "Requests and failures of both versions, shape (runs, looks); a burst is ten times the errors in 5 % of the blocks of 100, shared or of one version"
    def factor():
        return np.repeat(np.where(rng.random((runs, looks // 2)) < 0.05, 10, 1), 2, axis=1)
    shared = factor()
    fs, fc = {None: (1, 1), "shared": (shared, shared), "own": (factor(), factor())}[burst]
    ms, mc = np.full((runs, looks), LOOK * split), np.full((runs, looks), LOOK)
    return ms, rng.binomial(ms, np.minimum(p_stable * fs, 1)), mc, rng.binomial(mc, np.minimum(p_candidate * fc, 1))


def aborted(ms, ys, mc, yc, alpha=0.05, crash=True):
    "After how many requests to the candidate each run is sent back (inf: never), by blocks of 100 from the fifth on and by the crash detector"
    pair = lambda v: v.reshape(len(v), -1, 2).sum(-1)
    d = pair(yc) / pair(mc) - pair(ys) / pair(ms)
    over = lower_bound(d, SHARES["errors"] * alpha)[:, 4:] > 0
    found = np.where(over.any(1), (over.argmax(1) + 5) * 100, np.inf)
    if crash:
        hit = harm(ms, ys, mc, yc) >= math.log(1 / (SHARES["crash"] * alpha))
        found = np.minimum(found, np.where(hit.any(1), (hit.argmax(1) + 1) * LOOK, np.inf))
    return found


def most(alpha, runs):
    return alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)


SETTINGS = [(p, split, burst) for p in (0.005, 0.01, 0.02, 0.05) for split in (1, 9) for burst in (None, "shared")]


@pytest.mark.parametrize(("p", "split", "burst"), [(0.01, 9, None), (0.05, 1, "shared")])
def test_good_candidates_are_rarely_sent_back(p, split, burst):
    found = aborted(*simulated(np.random.default_rng(0), 300, 100, p, p, split, burst))
    assert np.isfinite(found).mean() <= most(0.05, 300)


@pytest.mark.drill
@pytest.mark.parametrize(("p", "split", "burst"), SETTINGS)
def test_false_aborts_over_a_whole_rollout(p, split, burst):
    found = aborted(*simulated(np.random.default_rng(1), 2000, 200, p, p, split, burst))
    assert np.isfinite(found).mean() <= most(0.05, 2000)


@pytest.mark.drill
@pytest.mark.parametrize("split", [1, 9])
@pytest.mark.parametrize("p", [0.005, 0.01, 0.02, 0.05])
def test_bursts_of_one_version_do_not_fool_the_blocks(p, split):
    "The block test alone; the crash detector takes a burst for the crash that it is until it ends, and what that costs is in benchmarks/rollout_gate.py"
    found = aborted(*simulated(np.random.default_rng(2), 2000, 200, p, p, split, "own"), crash=False)
    assert np.isfinite(found).mean() <= most(0.05, 2000)


@pytest.mark.drill
@pytest.mark.parametrize("split", [1, 9])
def test_what_is_found_and_how_soon(split):
    rng = np.random.default_rng(3)
    three = aborted(*simulated(rng, 2000, 200, 0.01, 0.03, split))
    crash = aborted(*simulated(rng, 2000, 200, 0.01, 0.10, split))
    assert np.isfinite(three).mean() >= 0.99 and np.median(three) <= 700 and np.quantile(three, 0.9) <= 1500
    assert np.median(crash) <= 150


@pytest.mark.drill
@pytest.mark.parametrize("split", [1, 9])
def test_who_is_promoted(split):
    rng, bound = np.random.default_rng(4), math.log(20)
    promoted = lambda p, q: (as_good(*simulated(rng, 2000, 200, p, q, split), 0.01) >= bound).any(1).mean()
    assert promoted(0.01, 0.01) >= 0.99
    for p, q in ((0.01, 0.02), (0.01, 0.03), (0.005, 0.015), (0.05, 0.06)):
        assert promoted(p, q) <= most(0.05, 2000)


def test_a_verdict_is_the_same_whenever_it_is_asked():
    "Evidence once reached stays: later looks take nothing back, and a resumed engine sees what the first one saw"
    rng = np.random.default_rng(5)
    blocks = [Block(t, Counts(450, int(rng.binomial(450, 0.01))), Counts(50, int(rng.binomial(50, 0.2)))) for t in range(10)]
    first = next(n for n in range(11) if judge(blocks[:n]).action == "abort")
    assert all(judge(blocks[:n]).action == "abort" for n in range(first, 11))
    assert judge(blocks).to_dict() == judge(list(blocks)).to_dict()


def test_nothing_is_promoted_without_evidence_for_it():
    for blocks in ([], [Block(0, Counts(10_000), Counts(0))], [Block(0, Counts(0), Counts(10_000))]):
        assert judge(blocks).action == "continue" and judge(blocks, deadline_passed=True).action == "pause"
    quick = [Block(t, Counts(50), Counts(50)) for t in range(40)]
    assert judge(quick, Policy(min_requests=5000)).action == "continue" and judge(quick).action == "promote"


def test_the_gate_judges_the_model_by_what_the_record_keeps():
    "Labels, pairs and predictions go from the looks of a record to the tests of the gate; a service without fault does not save a wrong model"
    from mlops_nb.rollout.run import gate
    from mlops_nb.rollout.strategies import make_spec
    arm = lambda **more: {"requests": 50, "errors": 0, "latency_sum": 1.0, **more}
    looks = lambda candidate, **more: [{"time": float(t), "step": 0, "weight": None, "stable": arm(labelled=30, correct=27, predictions={"late": 10, "fine": 40}), "candidate": arm(**candidate), **more} for t in range(20)]
    same = {"predictions": {"late": 10, "fine": 40}}
    wrong = gate(looks({"labelled": 30, "correct": 20, **same}), make_spec(), False)
    assert wrong["action"] == "abort" and "wrong more often" in wrong["reasons"][0]
    paired = gate(looks(same, pairs={"compared": 50, "different": 8, "better": 1, "worse": 7}), make_spec(), False)
    assert paired["action"] == "abort" and "it alone was wrong" in paired["reasons"][0]
    other = gate(looks({"predictions": {"late": 25, "fine": 25}}), make_spec(), False)
    assert other["action"] == "pause" and "distributed otherwise" in other["reasons"][0]
    better = {"predictions": {"late": 25, "fine": 25}, "labelled": 30, "correct": 28}
    assert gate(looks(better)[:2], make_spec(), False)["action"] == "wait" and gate(looks(better)[:2], make_spec(), True)["action"] == "pause"
    assert gate(looks(better), make_spec(policy={"margin": 0.05}), False)["action"] == "promote"
    good = gate(looks({"labelled": 30, "correct": 27, **same}, pairs={"compared": 50, "different": 2, "better": 1, "worse": 1}, outcomes="log away"), make_spec(policy={"margin": 0.05, "accuracy_margin": 0.1}), False)
    assert good["action"] == "promote", good["reasons"]


def test_refusals_go_through_the_record_to_the_gate():
    "A record of before refusals were counted is read as one without any; a stricter candidate goes back; what both versions refuse alike speaks against none"
    from mlops_nb.rollout.ports import Record, Revision
    from mlops_nb.rollout.run import arm_counts, gate
    from mlops_nb.rollout.strategies import make_spec
    rng = np.random.default_rng(6)

    def looks(stable, candidate, n=60):
        arm = lambda m, p: {"requests": m, "errors": 0, "slow": 0, "latency_sum": 0.05 * m, **({} if p is None else {"refused": int(rng.binomial(m, p))})}
        record = Record("m", 1, make_spec().model_dump(), Revision("3"), Revision("4"), blocks=[{"time": float(t), "step": 0, "weight": None, "stable": arm(450, stable), "candidate": arm(50, candidate)} for t in range(n)])
        return Record.from_dict(json.loads(json.dumps(record.to_dict())))

    strict, old = looks(0.001, 0.05), looks(None, None)
    told = gate(strict.blocks, make_spec(), False)
    assert told["action"] == "abort" and told["reasons"][0].startswith("refuses more requests: ") and len(told["reasons"]) == 1
    assert arm_counts(strict, "candidate")["refused"] == sum(b["candidate"]["refused"] for b in strict.blocks) > 50
    assert gate(old.blocks, make_spec(), False)["action"] == "promote" and arm_counts(old, "candidate")["refused"] == 0
    assert gate(looks(0.05, 0.05, 200).blocks, make_spec(), False)["action"] == "promote"
    assert "refused" not in gate(old.blocks, make_spec(), False)["evidence"]["as_good"]


@pytest.mark.parametrize("runs", [300, pytest.param(2000, marks=pytest.mark.drill)])
@pytest.mark.parametrize(("p", "split"), [(0.001, 9), (0.05, 1), (0.3, 9)])
def test_callers_who_err_send_no_candidate_back(p, split, runs):
    "Whatever share of the requests both versions refuse, the share of alpha that refusals have is kept"
    found = harm(*simulated(np.random.default_rng(7), runs, 100, p, p, split)) >= math.log(1 / (SHARES["refused"] * 0.05))
    assert found.any(1).mean() <= most(SHARES["refused"] * 0.05, runs)


@pytest.mark.parametrize("looks", [20, 21])
def test_a_busy_minute_sends_nobody_back_and_a_candidate_slow_alone_is_found(looks):
    "Slow requests at 100 %: a minute that began with the stable version's last looks goes on and is not the candidate's, wherever blocks end; after a steady stable version those with four slow requests in ten are found within half a minute"
    rng = np.random.default_rng(8)

    def found(last, alone):
        counts = lambda n, p: Counts(n, slow=int(rng.binomial(n, p)))
        told = []
        for _ in range(150):
            split = [Block(t, counts(60, p), Counts()) for t, p in enumerate([.05] * (looks - 2) + [last] * 2)]
            told.append(_alone([*split, *(Block(looks + t, Counts(), counts(120, alone)) for t in range(30))], Policy(), "slow")["log_e"])
        return np.mean(np.array(told) >= math.log(1 / (SHARES["alone_slow"] * 0.05)))

    assert found(0.4, 0.4) <= most(0.05, 150) and found(0.05, 0.05) == 0
    assert found(0.05, 0.4) >= 0.99
