"Monitoring: what a report says does not hang on how the window was cut, nor one part on another."
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mlops_nb.drift import Reference
from mlops_nb.monitoring import Monitor, Subject, decide, monitor, replay, report_from


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
