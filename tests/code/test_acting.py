"What the monitor decided is done by its job: once, within the policy, and by what holds a person back too."
import csv
from pathlib import Path

import pytest
from versions import bundles, empty_store, root  # noqa: F401  (fixtures)

from mlops_nb.audit import events, open_state
from mlops_nb.core import state_url
from mlops_nb.inference_log import Batch, Feedback, InferenceLog, Prediction, log_url
from mlops_nb.monitoring.run import _no_way_back
from mlops_nb.monitoring.window import subject_of
from mlops_nb.pipeline.act import act_on
from mlops_nb.registry import champion, promote, register


def report(action, version="2", start=0.0):
    return {"model": "boarding", "model_version": version, "window": {"start": start, "end": start + 86_400},
            "decision": {"action": action, "reasons": ["accuracy fell"]}}


@pytest.fixture
def served(root, bundles):  # noqa: F811
    "A project whose version 2 is served, after version 1"
    (root / "params.yaml").write_text("base: {name: boarding}\n")
    for b in bundles[:2]: register(b, actor="ada", root=root)
    promote("boarding", 2, "ada", root=root)
    return root


def test_the_way_back_is_taken_once(served):
    done = act_on(report("roll_back"), served)
    assert (done["done"], done["model_version"], champion("boarding", root=served).version) == (True, "1", 1)
    [event] = events(open_state(state_url(served)), action="rolled_back")
    assert (event["actor"], event["reason"]) == ("monitor", "accuracy fell")
    assert act_on(report("roll_back"), served) == {"done": True, "why": "version 2 is not served any more"}
    again = act_on(report("roll_back", "1"), served)                   # not to the version that was taken back
    assert not again["done"] and "no version to go back to" in again["why"] and champion("boarding", root=served).version == 1


def test_who_wants_to_be_told_only_is_told_only(served):
    (served / "params.yaml").write_text("base: {name: boarding}\nrollout: {guard: {act: false}}\n")
    done = act_on(report("roll_back"), served)
    assert not done["done"] and "guard.act is off" in done["why"] and champion("boarding", root=served).version == 2


def test_rows_to_review_are_written_once(served):
    log = InferenceLog(log_url(served))
    log.write([Batch(0., 0., [Prediction(f"p{i}", "boarding", "2", True, {"fare": float(i), "town": "Ulm"}, .5 + i / 100, 1., "", time=60. * i) for i in range(40)])])
    done = act_on(report("human_review"), served)
    rows = list(csv.DictReader((served / done["queue"]).open()))
    assert not done["done"] and done["queue"] in done["why"] and len(rows) == 40 and {r["reason"] for r in rows} >= {"unsure"}
    Path(served / done["queue"]).write_text("somebody is at work on it")
    assert act_on(report("human_review"), served)["queue"] == done["queue"] and (served / done["queue"]).read_text() == "somebody is at work on it"


def test_a_retraining_that_brings_nothing_new_leaves_work_while_the_version_is_served(served, monkeypatch):
    monkeypatch.setattr("mlops_nb.pipeline.retrain.retrain", lambda *_, **__: {"decision": "nothing", "reasons": ["the model is the champion already"]})
    assert not act_on(report("retrain"), served)["done"]
    promote("boarding", 1, "ada", root=served)
    assert act_on(report("retrain"), served)["done"]


def test_where_all_labels_have_come_no_empty_file_is_made(served):
    log = InferenceLog(log_url(served))
    log.write([Batch(0., 0., [r for i in range(40) for r in (Prediction(f"p{i}", "boarding", "2", True, {"fare": float(i), "town": "Ulm"}, .5, 1., "", time=60. * i), Feedback(f"f{i}", f"p{i}", True))])])
    done = act_on(report("human_review"), served)
    assert not done["done"] and "has its label already" in done["why"] and not (served / "artifacts/review").exists()


def test_whether_there_is_a_way_back_is_known_before_it_is_decided(root, bundles):  # noqa: F811
    (root / "params.yaml").write_text("base: {name: boarding}\n")
    register(bundles[0], actor="ada", root=root)
    told = lambda **which: _no_way_back(subject_of("boarding", root=root, **which))
    assert told().startswith("there is no version to go back to")
    register(bundles[1], actor="ada", root=root)
    promote("boarding", 2, "ada", root=root)
    assert (told(), told(version=1)) == ("", "")                         # version 1 is there; and of one that is not served nothing is said
    promote("boarding", 1, "ada", root=root)
    assert told() == "" and _no_way_back(subject_of(bundles[0], version=1)) == ""   # a bundle by itself has no past
