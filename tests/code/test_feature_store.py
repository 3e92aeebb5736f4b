"The feature store: point-in-time joins against their definition, both homes alike, killed at any time."
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.feature_store import FeatureStore, FeatureView, point_in_time
from mlops_nb.feature_store.online import Entry, RedisHome, SqliteHome

START = pd.Timestamp("2013-01-01")
ROWS = st.lists(st.tuples(st.sampled_from([None, "UA", "DL"]), st.integers(1, 2), st.integers(0, 20), st.integers(0, 6), st.one_of(st.none(), st.integers(0, 9))), max_size=25)
ASKED = st.lists(st.tuples(st.sampled_from([None, "UA", "DL", "XX"]), st.integers(1, 3), st.integers(-2, 28)), max_size=20)


def hours(values):
    return START + pd.to_timedelta(np.array(values, dtype=float), unit="h")


@settings(max_examples=40)
@given(rows=ROWS, asked=ASKED, ttl=st.sampled_from([None, 0, 3, 100]), inclusive=st.booleans(), late=st.booleans(), memory=st.sampled_from([None, "1GB"]))
def test_a_join_is_its_definition(rows, asked, ttl, inclusive, late, memory):
    "Two keys, nulls among keys and values, ties, late rows; every row comes back in its place"
    source = pd.DataFrame({"k": pd.Series([r[0] for r in rows], dtype=object), "m": pd.Series([r[1] for r in rows], dtype="int64"), "event": hours([r[2] for r in rows]),
                           "made": hours([r[2] + r[3] for r in rows]), "x": pd.Series([r[4] for r in rows], dtype="float64")})
    frame = pd.DataFrame({"k": pd.Series([a[0] for a in asked], dtype=object), "m": pd.Series([a[1] for a in asked], dtype="int64"), "t": hours([a[2] for a in asked])})
    if not len(source) or not len(frame):
        return
    view = FeatureView("v", ["k", "m"], "event", source, ["x"], ttl=None if ttl is None else f"{ttl}h", created="made" if late else None, inclusive=inclusive)
    expected = []
    for k, m, t in zip(frame.k, frame.m, frame.t):
        known = np.maximum(source.event, source.made) if late else source.event
        s = source[(source.k == k) & (source.m == m) & ((known <= t) if inclusive else (known < t))]
        best = s.assign(n=range(len(s))).sort_values(["event", *(["made"] if late else []), "n"]).iloc[-1] if k is not None and len(s) else None
        fresh = best is not None and (ttl is None or t - best.event <= pd.Timedelta(ttl, "h"))
        expected.append(best.x if fresh else np.nan)
    found = point_in_time(frame, [view], "t", memory)
    np.testing.assert_array_equal(found.x.to_numpy(float), np.array(expected, float))
    pd.testing.assert_frame_equal(found[["k", "m", "t"]], frame)


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
    assert h.read([("v", "k"), ("v", "other"), ("w", "k")]) == [Entry(49.0, {"x": 49, "word": "Zürich", "nothing": None}), None, None]
    many = [(f"k{i}", Entry(1.0, {"x": i})) for i in range(3000)]
    assert h.write("v", many) == 3000
    assert [e.values["x"] for e in h.read([("v", k) for k, _ in many])] == list(range(3000))
    h.close()


def test_redis_forgets_what_is_too_old(redis):
    h = RedisHome(redis.url(), prefix="old")
    h.write("v", [("old", Entry(time.time() - 100, {"x": 1})), ("new", Entry(time.time(), {"x": 2}))], ttl=50)
    assert [e and e.values["x"] for e in h.read([("v", "old"), ("v", "new")])] == [None, 2]


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


def test_two_materialize_at_once(tmp_path, url):
    make_source(tmp_path / "s.parquet", 20_000)
    both = [subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "s.parquet"), url], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for p in both:
        assert p.wait(120) == 0, p.stderr.read()
    store = FeatureStore([FeatureView("v", "k", "t", tmp_path / "s.parquet", ["x"])], url)
    last = pd.read_parquet(tmp_path / "s.parquet").query("t <= '2013-01-12'").groupby("k").x.last()
    assert [f.values["x"] for f in store.online([{"k": int(k)} for k in last.index])] == last.tolist()
    store.home.close()
