"The inference log's database: whatever a caller sends is stored, windows have the types of what was sent, memory is bounded, SQLite and PostgreSQL agree."
import json
import math
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta, timezone

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlops_nb.core import MlopsError
from mlops_nb.inference_log import Batch, Feedback, InferenceLog, Prediction, Shipper, Spool, forget, log_rules, new_id, retain

NOON = 1_700_000_000.0


@pytest.fixture(params=["sqlite", "postgresql"])
def log(request, tmp_path):
    "An empty log"
    return InferenceLog(f"sqlite:///{tmp_path}/log.db" if request.param == "sqlite" else request.getfixturevalue("postgres").new_database())


@pytest.fixture(scope="module")
def logs(postgres, tmp_path_factory):
    "One log of each kind, to be filled again and again"
    return InferenceLog(f"sqlite:///{tmp_path_factory.mktemp('log')}/log.db"), InferenceLog(postgres.new_database())


def row(i, features=None, label="late", **kw):
    return Prediction(f"id{i}", kw.pop("model", "flights"), kw.pop("version", "3"), label, features if features is not None else {"x": i}, **kw)


def put(log, *predictions, logged=NOON):
    log.write([Batch(logged, logged, list(predictions))])


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()), lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(), v, max_size=2), max_leaves=4)


@settings(max_examples=25)
@given(features=st.dictionaries(st.text(st.characters()), values, max_size=4), label=values, score=st.floats() | st.none(), text=st.text(st.characters()),
       time=st.floats() | st.none(), number=st.integers(-2**70, 2**70))
@example(features={"a\0b": "c\0d", "prediction": 2**80}, label="\ud800", score=math.inf, text="\0", time=1e300, number=2**64)
@example(features={"back": r"\u0000", "\\\\\0": "\\\0\\\\\0\0"}, label=r"\u0000", score=0.0, text=r"\u0000", time=math.nan, number=1)
@example(features={"x": 10**400}, label=10**400, score=math.nan, text="", time=-math.inf, number=0)
def test_whatever_is_sent_is_stored_and_read_back(logs, tmp_path_factory, features, label, score, text, time, number):
    spool = Spool(tmp_path_factory.mktemp("spool"))
    prediction, good = new_id(), new_id()
    spool.append([Prediction(prediction, text, "1", label, features, score=score, request_id=text, row=number, entity=text, caller=text, time=time),
                  Prediction(good, "m", "1", 1, {}), Feedback(new_id(), good, label, comment=text, caller=text, time=time)])
    for log in logs:
        shipper = Shipper(spool.directory, log.engine.url.render_as_string(hide_password=False))
        shipper.ship()
        assert shipper.status["rejected"] == 0
        for found in (prediction, good):
            window = log.window(where={"prediction_id": found})
            assert len(window) == 1
        read = log.window(where={"prediction_id": prediction})
        assert len(read.columns) >= 14 + len({k.replace("\0", "") for k in features})
    spool.close()


def test_types_are_those_of_the_values(log):
    put(log, row(0, {"i": 2**60 + 1, "n": 2**53 + 1, "b": True, "t": "a", "j": [1], "mixed": 1, "empty": None, "big": 2**70, "some": None}),
        row(1, {"i": 2, "n": 1.5, "b": None, "t": "b", "j": {"k": 1}, "mixed": "a", "empty": None, "big": 1, "some": 3}))
    window, schema = log.window(), next(log.batches()).schema
    assert {c: str(schema.field(c).type) for c in ("i", "n", "b", "t", "j", "mixed", "empty", "big", "some")} == {
        "i": "int64", "n": "double", "b": "bool", "t": "string", "j": "string", "mixed": "string", "empty": "double", "big": "double", "some": "int64"}
    assert window.mixed.tolist() == ["1", "a"]
    assert window.j.tolist() == ["[1]", '{"k":1}']
    assert window.big[0] == float(2**70)
    assert window.i[0] == 2**60 + 1
    assert window["empty"].isna().all()


@pytest.mark.parametrize(("label", "kind"), [("late", "string"), (1, "int64"), (1.5, "double"), (True, "bool")])
def test_prediction_and_feedback_keep_their_types(log, label, kind):
    put(log, row(0, label=label))
    log.write([Batch(NOON, NOON, [Feedback("f", "id0", label)])])
    schema = next(log.batches()).schema
    assert str(schema.field("prediction").type) == str(schema.field("feedback").type) == kind
    assert log.window()[["prediction", "feedback"]].loc[0].tolist() == [label, label]


def test_models_side_by_side_have_columns_and_types_of_their_own(log):
    put(log, row(0, {"x": 1}, model="a", label="late"), row(1, {"y": "u"}, model="b", label=2.5), row(2, {"x": 1, "z": 1}, model="a", version="4"))
    log.write([Batch(NOON, NOON, [Feedback("f0", "id0", "late"), Feedback("f1", "id1", 2.25)])])
    a, b = log.window(where={"model_name": "a", "model_version": "3"}), log.window(where={"model_name": "b"})
    assert [c for c in ("x", "y", "z") if c in a] == ["x"]
    assert [c for c in ("x", "y", "z") if c in b] == ["y"]
    assert b.feedback.tolist() == [2.25]
    assert log.window().feedback.tolist()[:2] == ["late", "2.25"]
    assert list(log.window(where={"model_name": "none"}).columns) == list(log.window(NOON + 1e6).columns)


def test_a_feature_named_like_a_column_of_the_log(log):
    put(log, row(0, {"score": 7, "time": "noon", "x": 1}, score=0.5))
    window = log.window()
    assert window.score[0] == 0.5
    assert window[["feature.score", "feature.time"]].loc[0].tolist() == [7, "noon"]


def test_windows_meet_without_gap_or_overlap(log):
    put(log, *[row(i, time=NOON + i / 7) for i in range(200)])
    cuts = [None, NOON + 3 / 7, NOON + 50 / 7, NOON + 50.1 / 7, NOON + 100, None]
    parts = [log.window(a, b) for a, b in zip(cuts, cuts[1:])]
    assert pd.concat(parts).prediction_id.tolist() == [f"id{i}" for i in range(200)]


def test_a_start_may_be_said_in_many_ways(log):
    put(log, row(0, time=NOON), row(1, time=NOON + 3600))
    moment = datetime.fromtimestamp(NOON + 3600, UTC)
    for start in (moment, moment.replace(tzinfo=None), moment.astimezone(timezone(timedelta(hours=9))), moment.isoformat(), pd.Timestamp(moment), NOON + 3600, int(NOON + 3600)):
        assert log.window(start).prediction_id.tolist() == ["id1"], start


def test_event_time_is_not_the_time_logged(log):
    put(log, row(0, time=NOON - 86_400), row(1))
    window = log.window()
    assert window.time.diff()[1] == pd.Timedelta("1D")
    assert window.logged.nunique() == 1
    assert log.window(NOON - 1).prediction_id.tolist() == ["id1"]


def test_the_last_rows_in_order_of_time(log):
    put(log, *[row(i, time=NOON + i % 50, caller="ab"[i % 2]) for i in range(300)])
    everything = log.window()
    assert everything.time.is_monotonic_increasing
    assert log.window(last=70).prediction_id.tolist() == everything.prediction_id.tolist()[-70:]
    assert log.window(last=10, where={"caller": "b"}).prediction_id.tolist() == everything[everything.caller == "b"].prediction_id.tolist()[-10:]
    assert len(log.window(last=1000)) == 300


def test_batches_have_the_wanted_size_and_one_schema_and_add_up(log):
    put(log, *[row(i, {"x": i, **({"late column": 1.5} if i > 290 else {})}) for i in range(300)])
    batches = list(log.batches(rows=100))
    assert [b.num_rows for b in batches] == [100] * 3
    assert len({b.schema for b in batches}) == 1
    assert pa.Table.from_batches(batches).to_pandas().equals(log.window())
    assert [b.num_rows for b in log.batches(NOON + 1)] == [0]


def test_writing_goes_on_while_a_window_is_read(log):
    put(log, *[row(i) for i in range(100)])
    reader = log.batches(rows=10)
    next(reader)
    writer = threading.Thread(target=lambda: put(log, *[row(i) for i in range(100, 200)]))
    writer.start()
    writer.join(180)
    assert not writer.is_alive()
    assert sum(b.num_rows for b in reader) == 90
    assert len(log.window()) == 200


def test_memory_does_not_grow_with_the_window(tmp_path):
    url = f"sqlite:///{tmp_path}/log.db"
    log = InferenceLog(url)
    for part in range(7):
        put(log, *[row(part * 5000 + i, {f"feature_{k}": i / 7 for k in range(20)}) for i in range(5000)])
    code = """if True:
        import sys
        from mlops_nb.inference_log import InferenceLog
        peak = lambda: next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
        batches, rows = InferenceLog(sys.argv[1]).batches(rows=5000), 0
        for n, batch in enumerate(batches):
            rows += batch.num_rows
            if n == 2: early = peak()
        print(rows, peak() - early)"""
    rows, grown = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, check=True).stdout.split()
    assert int(rows) == 35_000
    assert float(grown) < 10


def test_entities_are_forgotten_and_rows_expire(log):
    put(log, *[row(i, entity=f"N{i % 5}") for i in range(50)], *[row(i, model="trains", entity="N1") for i in range(50, 60)], logged=NOON - 40 * 86_400)
    put(log, row(99, entity="N1"))
    assert forget(log, "N1", now=NOON) == 21
    put(log, row(100, entity="N1"), logged=NOON - 1)
    put(log, row(101, entity="N1"), logged=NOON + 1)
    assert log.window(where={"entity": "N1"}).prediction_id.tolist() == ["id101"]
    rules = log_rules({"keep": [{"where": {"model_name": "flights", "entity": "N2"}, "days": 50}, {"days": 30}]})
    assert retain(log, rules, now=NOON) == 30
    assert set(log.window().entity) == {"N1", "N2"}


@pytest.mark.parametrize("url", ["", "mysql://u@h/d", "nonsense", "redis://x"])
def test_a_url_of_no_database_it_can_use(url, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if not url:
        monkeypatch.setenv("MLOPS_NB_LOG_URL", "oracle://x")
    with pytest.raises(MlopsError, match="sqlite:///PATH"):
        InferenceLog(url or None)


def test_errors_do_not_show_the_password(postgres):
    url = postgres.new_database().replace("postgres@", "postgres:secret@").replace(str(postgres.port), "1")
    with pytest.raises(MlopsError, match="check that it is there") as e:
        InferenceLog(url).window()
    assert "secret" not in str(e.value)


def test_features_survive_as_sent(log):
    sent = {"flight": 1545, "carrier": "UA", "wind": 10.357019999999999, "grüße": "ä😀\"\\/\n", "nested": {"a": [1, {"b": None}]}}
    put(log, row(0, sent))
    with log.transaction(only_reads=True) as connection:
        assert json.loads(connection.exec_driver_sql("SELECT features FROM predictions").scalar()) == sent
