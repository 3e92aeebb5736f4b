"Monitoring: what a report says does not hang on how the window was cut, nor one part on another."
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import sqlalchemy as sa
from sklearn.linear_model import LogisticRegression

from mlops_nb.audit import events, transaction
from mlops_nb.core import MlopsError, canonical_json, digest
from mlops_nb.drift import Reference
from mlops_nb.inference_log import Batch, Feedback, InferenceLog, Prediction
from mlops_nb.jobs import run_job
from mlops_nb.monitoring import Monitor, Subject, Trends, decide, monitor, replay, report_from, settings
from mlops_nb.monitoring.run import _remembered
from mlops_nb.packaging import package
from mlops_nb.rollout.outcomes import Outcomes

ROOT = Path(__file__).parents[2]


def window(seed, shift=0.0, n=1500):
    "A log of a model of two columns"
    rng = np.random.default_rng(seed)
    x = rng.normal(shift, 1, n)
    score = 1 / (1 + np.exp(-2 * x))
    late = pd.array(rng.random(n) < score, dtype="boolean")
    late[::3] = pd.NA
    return pd.DataFrame({"prediction_id": [f"{i}" for i in range(n)], "time": pd.date_range("2013-04-01", periods=n, freq="min", tz="UTC"), "model_version": "3", "x": x, "town": rng.choice(["Cork", "Ulm"], n),
                         "prediction": score > .5, "score": score, "feedback": late, "latency_ms": rng.lognormal(0, 1, n), "caller": rng.choice(["ann", "bob"], n)})


SUBJECT = Subject("m", version="3", classes=[False, True], reference=Reference.fit(window(0)[["x", "town"]]), metrics={"roc_auc": {"value": .85}, "accuracy": {"value": .76}})


@pytest.mark.parametrize("rows", [1, 7, 400, 1500])
def test_the_size_of_batches_changes_nothing(rows):
    table = pa.Table.from_pandas(window(1), preserve_index=False)
    if rows == 1:
        table = table.slice(0, 200)
    whole, cut = (monitor(w, SUBJECT, root="nowhere").to_dict() for w in (table, iter(table.to_batches(rows))))
    assert whole == cut


@pytest.mark.parametrize("column", ["time", "x", "town", "prediction", "score", "feedback", "latency_ms", "caller", "prediction_id"])
@pytest.mark.parametrize("how", ["absent", "missing", "nonsense"])
def test_a_column_that_is_broken_breaks_no_report(column, how):
    frame = window(2, n=300)
    frame = frame.drop(columns=column) if how == "absent" else frame.assign(**{column: None if how == "missing" else "nonsense"})
    report = monitor(frame, SUBJECT, root="nowhere")
    assert set(report.parts) == {"performance", "drift", "quality", "system", "security", "business", "feedback"}
    assert len(report.parts) - len(report.failed) >= 2
    assert all(report.parts[f]["error"] for f in report.failed)
    assert report_from(report.to_dict()).to_dict() == report.to_dict()
    assert len(report._repr_html_()) < 300_000


def test_replay_says_what_was_decided():
    reports = []
    for day, shift in enumerate([0, 1.5, 1.5, 0]):
        start = 1_364_774_400 + 86_400 * day
        reports.append(monitor(window(day + 5, shift), SUBJECT, start=start, end=start + 86_400, past=list(reports), root="nowhere").to_dict())
    again = replay(reports[::-1])
    assert [d["action"] for d in again] == [r["decision"]["action"] for r in reports] == [d["before"] for d in again]
    assert decide(reports[2], Monitor(rules=[]))["action"] == "nothing"


def kept(end, action="nothing", length=3600.0, version="3"):
    "A report as the state database keeps it"
    return {"version": 1, "kind": "monitoring", "model": "m", "model_version": version, "window": {"start": end - length, "end": end, "rows": 500, "labelled": 0}, "parts": {},
            "decision": {"action": action, "reasons": [], "rule": None, "withheld": [], "silent": []}}


def fill(trends, reports):
    "Keep many reports in one transaction"
    texts = [canonical_json(r) for r in reports]
    with transaction(trends.engine) as connection:
        connection.execute(trends.table.insert(), [{"model": "m", "version": r["model_version"], **{k: r["window"][k] for k in ("start", "end")}, "action": r["decision"]["action"], "report": t, "digest": digest(t.encode())}
                                                   for r, t in zip(reports, texts)])


def test_what_was_decided_is_remembered_for_as_long_as_its_cool_down(tmp_path):
    hour, trends = 3600.0, Trends(tmp_path)
    fill(trends, [kept(n * hour, "retrain" if n == 0 else "alert") for n in range(100)])
    falling = {**kept(100 * hour), "parts": {"performance": {"ok": True, "evaluated": 500, "main": "f1", "metrics": {"f1": {"fall_certain": 0.1}}}}}
    past = _remembered(trends, SUBJECT, 99 * hour, 100 * hour, Monitor())
    assert len(past) == 61 and decide(falling, Monitor(), past)["withheld"][0]["action"] == "retrain"
    assert decide(falling, Monitor(), _remembered(trends, SUBJECT, 99 * hour, 100 * hour, Monitor(cooldown={})))["action"] == "retrain"


def test_windows_running_are_found_behind_many_that_overlap(tmp_path):
    day, trends = 86_400.0, Trends(tmp_path)
    fill(trends, [kept(10 * day - n * 600, length=day, version=v) for n in range(90) for v in "34"])   # a day is watched every ten minutes, and another version beside it
    fill(trends, [kept(9 * day + 30, length=day)])
    rules = [{"when": "drift.share", "above": 0, "windows": 2, "action": "alert"}]
    past = _remembered(trends, SUBJECT, 9 * day, 10 * day, settings({"rules": rules}))
    assert past[0] == kept(9 * day + 30, length=day)


def test_a_log_in_postgresql_says_the_same(tmp_path, postgres):
    "The report of a window, and what a rollout's gate asks of a log, which it does not wait for"
    frame, start, urls = window(3, n=600), 1_364_774_400.0, [f"sqlite:///{tmp_path}/log.db", postgres.new_database()]
    made = [Prediction(f"{v}{r.prediction_id}", "m", v, bool(r.prediction), {"x": r.x, "town": r.town}, r.score, r.latency_ms, f"r{i}", caller=r.caller, time=start + 60 * i)
            for i, r in enumerate(frame.itertuples()) for v in ("3", "4")[: 1 + i % 2]]
    truths = [Feedback(f"f{i}", f"3{r.prediction_id}", bool(r.feedback)) for i, r in enumerate(frame.itertuples()) if not pd.isna(r.feedback)]
    for url in urls:
        InferenceLog(url).write([Batch(start, start, made), Batch(start + 9, start + 9, truths)])
    reports = [monitor(log=url, model=SUBJECT, root="nowhere") for url in urls]
    assert reports[0].to_dict() == reports[1].to_dict() and not reports[0].failed and reports[0].window["rows"] >= 600
    one, other = (Outcomes("m", url, patience=100) for url in urls)
    for ask in (lambda o: o.began("4", start + 5), lambda o: o.predicted(["3", "4"], start, start + 1), lambda o: o.labelled(["3", "4"], start, start, start + 10), lambda o: o.pairs("3", "4", start, start, start + 10)):
        assert ask(one) == ask(other)
    assert one.pairs("3", "4", start, start, start + 10)["compared"] == 300
    with pytest.raises(MlopsError, match="did not answer within 0.2 s"):
        Outcomes("m", urls[1], patience=0.2)._rows(sa.select(sa.func.pg_sleep(20)))


@pytest.mark.drill
def test_the_job_keeps_its_report_and_shows_its_gauges_once(tmp_path, monkeypatch):
    for name in ("MLOPS_NB_STATE_URL", "MLOPS_NB_LOG_URL"):
        monkeypatch.delenv(name, raising=False)
    rng = np.random.default_rng(0)
    train = pd.DataFrame({"x": rng.normal(size=1000)})
    package(LogisticRegression().fit(train, train.x > 0), tmp_path / "bundle", name="toy", sample=train, reference=Reference.fit(train), metadata={"target": "late"})
    (tmp_path / "params.yaml").write_text("base: {name: toy}\nmonitor: {window: 1D, season: null}\n")
    (tmp_path / "jobs").mkdir()
    shutil.copy(ROOT / "nbs/jobs/monitor.ipynb", tmp_path / "jobs")
    (tmp_path / ".mlops_nb").mkdir()
    log = InferenceLog(f"sqlite:///{tmp_path}/.mlops_nb/inference.db")
    start = 1_365_033_600.0
    log.write([Batch(start, start, [Prediction(f"{i}", "toy", "", True, {"x": float(x)}, 0.9, 1.0, f"r{i}", time=start + 60 * i) for i, x in enumerate(rng.normal(3, 1, 500))])])
    window = {"start": "2013-04-04", "end": "2013-04-05", "model": "bundle"}
    for force in (False, True):
        assert run_job("monitor", window, root=tmp_path, force=force, tell=lambda text: None)["decision"] == "human_review"
    trends = Trends(tmp_path)
    assert [r["decision"]["action"] for r in trends.past("toy")] == ["human_review"]
    assert [e["action"] for e in events(trends.engine) if e["action"].startswith("monitor")] == ["monitor: human_review"]
    assert 'model_data_drift_score{model_name="toy",feature_name="x"}' in (tmp_path / ".mlops_nb/metrics/toy.prom").read_text()


def answered(task, n=300):
    "A log of a model of that task, and what is known of the model"
    frame, rng = window(7, n=n).assign(feedback=lambda f: f["x"] > 0), np.random.default_rng(7)
    if task == "multiclass":
        frame["prediction"], frame["score"] = rng.choice(["a", "b", "c"], n), rng.uniform(.4, 1, n)
        frame["feedback"] = np.where(rng.random(n) < .7, frame["prediction"], "c")
    if task == "regression": frame["prediction"], frame["score"], frame["feedback"] = 2 * frame["x"], np.nan, 2 * frame["x"] + rng.normal(0, .5, n)
    profiled = frame[["x", "town", "prediction", *(["score"] if task != "regression" else [])]].assign(target=frame["feedback"])
    metrics = {"binary": {"accuracy": {"value": .9}}, "multiclass": {"accuracy": {"value": .7}}, "regression": {"rmse": {"value": .5}}}[task]
    classes = {"binary": [False, True], "multiclass": ["a", "b", "c"], "regression": []}[task]
    return frame.astype({"feedback": object}), Subject("m", "3", task, classes, reference=Reference.fit(profiled), metrics=metrics)


ODD = {"all labelled": lambda f: f, "no labels": lambda f: f.assign(feedback=None), "one row": lambda f: f.head(1), "one row without a label": lambda f: f.head(1).assign(feedback=None),
       "one label": lambda f: f.assign(feedback=f["feedback"].iloc[0]), "one answer": lambda f: f.assign(prediction=f["prediction"].iloc[0]), "no rows": lambda f: f.head(0),
       "another version's rows": lambda f: f.assign(model_version="2"), "no scores": lambda f: f.assign(score=np.nan)}


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
@pytest.mark.parametrize("odd", ODD)
def test_an_odd_window_is_no_failed_part(task, odd, tmp_path):
    "Whatever a window lacks is said, not stumbled over; and a window without rows says that first"
    frame, subject = answered(task)
    report = monitor(ODD[odd](frame), subject, start="2013-04-01", end="2013-04-02", root=tmp_path)
    page, empty = report._repr_html_(), odd in ("no rows", "another version's rows")
    assert report.failed == [] and ("no predictions in this window" in page) == empty
    assert report_from(report.to_dict())._repr_html_() == page and len(report.frame) > 0
    if empty: assert report.decision.action == "nothing" and report.decision.reasons[0].startswith("version 3 made no predictions in this window")
    if odd.startswith("one row"): assert report.decision.action == "nothing"                # too little to decide upon


def test_an_outage_is_told_until_it_is_over(tmp_path):
    "A week of traffic, two days without any, and traffic again: the monitor says alert, and the alert is resolved when callers are back"
    from mlops_nb.alerting import Alerting
    start, day, url = 1_364_774_400., 86_400., f"sqlite:///{tmp_path}/log.db"
    log, alerting = InferenceLog(url), Alerting(tmp_path, {}, f"sqlite:///{tmp_path}/state.db", lambda: start)
    for d in (*range(7), 9): log.write([Batch(0., 0., [Prediction(f"{d}-{i}", "m", "3", True, {"x": 1.}, .9, 1., "", time=start + day * d + i) for i in range(50)])])
    states = []
    for d in range(6, 10):
        report = monitor(model=Subject("m", version="3", reference=Reference.fit(pd.DataFrame({"x": [1.] * 50}))), start=start + day * d,
                         end=start + day * (d + 1), log=url, root=tmp_path)
        done = alerting.observe(report.to_dict(), deliver=False)
        states.append((report.decision.action, [a.type for a in done["firing"] if a.type == "traffic_fall"], [a.type for a in done["over"]]))
    assert states == [("nothing", [], []), ("alert", ["traffic_fall"], []), ("alert", ["traffic_fall"], []), ("nothing", [], ["traffic_fall"])]
