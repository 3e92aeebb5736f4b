"Ingestion against real sources that fail: kills at any point, servers that misbehave, disks and messages that are bad; nothing lost, nothing doubled, no secret written down."
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest

from mlops_nb.audit import events, open_state
from mlops_nb.core import MlopsError, read_frame
from mlops_nb.ingestion.batch import ingest_batches
from mlops_nb.ingestion.connector import find_connector
from mlops_nb.ingestion.runs import history
from mlops_nb.ingestion.store import manifests
from mlops_nb.ingestion.streaming import ingest_stream

sys.path.append(str(Path(__file__).resolve().parents[1]))
from servers import Postgres, Redis, binary  # noqa: E402

SECRET = "pl4nted-s3cret"


def balanced(store):
    "Every manifest accounts for what was read"
    found = manifests(store)
    assert all(m["read"] == m["rows"] + m["quarantined"] + sum(m["dropped"].values()) for m in found)
    return sum(m["read"] for m in found)


def wait(condition, seconds=60):
    "Wait until it holds"
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be in time"
        time.sleep(0.05)


# ---- HTTP


@pytest.fixture
def api():
    "A server whose answers a test sets, one function a request; the last one repeats"
    answers, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            asked.append((self.path, dict(self.headers)))
            answer = answers[min(len(asked), len(answers)) - 1]
            status, body, headers = answer(self) if callable(answer) else answer
            self.send_response(status)
            for k, v in {"Content-Length": len(body), **headers}.items():
                self.send_header(k, str(v))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def log_message(self, *args): pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.answers, server.asked, server.url = answers, asked, f"http://127.0.0.1:{server.server_port}/items"
    yield server
    server.shutdown()
    server.server_close()


def slow(handler):
    time.sleep(1.5)
    return 200, b"[]", {}


GOOD = (200, b'[{"id": 1}, {"id": 2}]', {})


@pytest.mark.parametrize("bad", [(429, b"", {"Retry-After": "0"}), (500, b"oops", {}), (503, b"", {}), (200, b'[{"id"', {"Content-Length": 500}), slow],
                         ids=["429", "500", "503", "truncated", "slow"])
def test_an_api_that_recovers(api, tmp_path, bad):
    api.answers += [bad, bad, GOOD]
    run = ingest_batches({"type": "api", "url": api.url, "timeout": 0.5, "backoff": 0.01}, tmp_path / "raw")
    assert (run.read, run.rows, len(api.asked)) == (2, 2, 3) and balanced(tmp_path / "raw") == 2


@pytest.mark.parametrize("answer, message", [((500, b"", {}), "status 500; given up after 3 tries"), ((404, b"no", {}), "status 404: no"),
                                             ((200, b"<html>", {"Content-Type": "text/html"}), "no JSON came but text/html"),
                                             ((200, b'{"a": 1}', {}), "a list of records is wanted"), ((429, b"", {"Retry-After": "999"}), "it asks to wait 999 s")])
def test_an_api_that_does_not(api, tmp_path, answer, message, monkeypatch):
    "One line that says what is wrong, and the token stays secret"
    monkeypatch.setenv("API_TOKEN", SECRET)
    state = open_state(f"sqlite:///{tmp_path}/state.db")
    api.answers.append(answer)
    with pytest.raises(MlopsError, match=message) as caught:
        ingest_batches({"type": "api", "url": api.url + f"?key={SECRET}", "token": "${API_TOKEN}", "retries": 2, "backoff": 0.01}, tmp_path / "raw", state=state)
    assert api.asked[0][1]["Authorization"] == f"Bearer {SECRET}"
    assert len(str(caught.value).splitlines()) == 1 and SECRET not in str(caught.value)
    assert SECRET not in history(state)["error"].iloc[0] + str(events(state))


def test_pages_by_link_and_cursor(api, tmp_path):
    api.answers += [(200, b'[{"id": 1}]', {"Link": '</items?p=2>; rel="next"'}), (200, b'[{"id": 2}, 7]', {})]
    run = ingest_batches({"type": "api", "url": api.url, "pagination": "link"}, tmp_path / "raw")
    assert (run.read, run.rows, run.quarantined) == (3, 2, 1) and api.asked[1][0] == "/items?p=2"
    api.answers[:] = [(200, b'{"rows": [{"id": 3}], "next": "x"}', {})] * 3 + [(200, b'{"rows": [{"id": 4}], "next": null}', {})]
    assert ingest_batches({"type": "api", "url": api.url, "pagination": "cursor", "records": "rows", "max_pages": 9, "mode": "append"}, tmp_path / "c").rows == 2
    api.answers[:] = [(200, b"[]", {"Link": '<http://elsewhere.example/>; rel="next"'})]
    with pytest.raises(MlopsError, match="to which the token is not sent"):
        ingest_batches({"type": "api", "url": api.url, "pagination": "link"}, tmp_path / "d")


# ---- databases


@pytest.fixture(scope="module")
def postgres():
    "PostgreSQL"
    if not binary("initdb"):
        pytest.skip("PostgreSQL is not installed")
    server = Postgres().start()
    yield server
    server.close()


def test_postgresql_incrementally(postgres, tmp_path):
    import sqlalchemy as sa
    url = postgres.new_database()
    engine = sa.create_engine(url)
    with engine.begin() as c:
        c.execute(sa.text("CREATE TABLE sales (id bigint, at timestamptz, price numeric(8,2), note text)"))
        c.execute(sa.text("INSERT INTO sales SELECT i, timestamptz '2024-01-01' + i * interval '1 hour', i / 4.0, CASE WHEN i > 3000 THEN 'x' END FROM generate_series(1, 5000) i"))
    config = {"type": "database", "url": url, "table": "public.sales", "watermark": "at", "batch_rows": 1000, "partition": "at"}
    assert ingest_batches(config, tmp_path / "raw").rows == 5000
    with engine.begin() as c:
        c.execute(sa.text("INSERT INTO sales VALUES (5001, timestamptz '2025-01-01', 1, NULL)"))
    assert [ingest_batches(config, tmp_path / "raw").rows for _ in range(2)] == [1, 0]
    back = read_frame(tmp_path / "raw")
    assert sorted(back["id"]) == list(range(1, 5002)) and back["price"].dtype == float and balanced(tmp_path / "raw") == 5001
    postgres.kill()
    with pytest.raises(MlopsError, match="database: .*refused"):
        ingest_batches(config, tmp_path / "raw")
    postgres.start()
    assert ingest_batches(config, tmp_path / "raw").rows == 0
    engine.dispose()


KILLED = """
import os, signal, sys
import mlops_nb.ingestion.batch as batch, mlops_nb.ingestion.store as store
point, folder = sys.argv[1], sys.argv[2]
def dying(function):
    def call(*args, **more):
        if point == "before": os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **more)
        os.kill(os.getpid(), signal.SIGKILL)
    return call
if point in ("before", "after"): batch.commit_append = dying(batch.commit_append)
else: batch.end_run = dying(batch.end_run)
from mlops_nb.audit import open_state
batch.ingest_batches({"type": "database", "url": f"sqlite:///{folder}/shop.db", "table": "sales", "watermark": "id"}, f"{folder}/raw", state=open_state(f"sqlite:///{folder}/state.db"))
"""


@pytest.mark.drill
@pytest.mark.parametrize("point", ["before", "after", "recorded"])
def test_a_killed_run_neither_loses_nor_doubles(tmp_path, point):
    with sqlite3.connect(tmp_path / "shop.db") as c:
        c.execute("CREATE TABLE sales (id INTEGER)")
        c.executemany("INSERT INTO sales VALUES (?)", [(i,) for i in range(10)])
    assert subprocess.run([sys.executable, "-c", KILLED, point, str(tmp_path)], timeout=120).returncode == -signal.SIGKILL
    with sqlite3.connect(tmp_path / "shop.db") as c:
        c.execute("INSERT INTO sales VALUES (10)")
    state = open_state(f"sqlite:///{tmp_path}/state.db")
    ingest_batches({"type": "database", "url": f"sqlite:///{tmp_path}/shop.db", "table": "sales", "watermark": "id"}, tmp_path / "raw", state=state)
    assert sorted(read_frame(tmp_path / "raw")["id"]) == list(range(11)) and balanced(tmp_path / "raw") == 11
    assert history(state)["state"].iloc[-1] == "done" and not list(tmp_path.glob(".raw*"))


# ---- streams


@pytest.fixture
def redis_server():
    "Redis"
    if not binary("redis-server"):
        pytest.skip("Redis is not installed")
    server = Redis().start()
    yield server
    server.close()


def put(server, *values):
    "Messages for the stream `flights`"
    import redis
    with redis.Redis.from_url(server.url()) as client:
        for v in values:
            client.xadd("flights", {"data": v})


def stream_config(server, **more):
    return {"type": "redis", "url": server.url(), "stream": "flights", "field": "data", "batch_rows": 4, "batch_seconds": 0.5, **more}


def test_redis_bad_messages_and_a_restart(redis_server, tmp_path):
    state = open_state(f"sqlite:///{tmp_path}/state.db")
    put(redis_server, *[json.dumps({"id": i}) for i in range(3)], "{", "[1]", json.dumps({"id": 3}))
    run = ingest_stream(stream_config(redis_server), tmp_path / "raw", state=state, batches=2)
    assert (run.read, run.rows, run.quarantined) == (6, 4, 2)
    told = [json.loads(line) for p in (tmp_path / "raw").glob("*/_quarantine.jsonl") for line in p.read_text().splitlines()]
    assert {t["raw"] for t in told} == {'{"data": "{"}', '{"data": "[1]"}'} and all(t["_reasons"] and t["place"].startswith("flights ") for t in told)
    redis_server.kill()
    redis_server.start()                       # nothing was written to disk: stream and group are gone
    said = []
    put(redis_server, json.dumps({"id": 4}))
    assert ingest_stream(stream_config(redis_server), tmp_path / "raw", state=state, batches=1, say=said.append).rows == 1
    assert sorted(read_frame(tmp_path / "raw")["id"]) == [0, 1, 2, 3, 4] and balanced(tmp_path / "raw") == 7


@pytest.mark.drill
def test_redis_dies_while_we_read(redis_server, tmp_path):
    stop, said, result = threading.Event(), [], []
    put(redis_server, json.dumps({"id": 0}))
    work = threading.Thread(target=lambda: result.append(ingest_stream(stream_config(redis_server, max_pause=0.2), tmp_path / "raw", stop=stop, say=said.append)))
    work.start()
    try:
        wait(lambda: len(manifests(tmp_path / "raw")) == 1)
        redis_server.kill()
        wait(lambda: any("failed" in s for s in said))
        redis_server.start()
        put(redis_server, json.dumps({"id": 1}))
        wait(lambda: len(manifests(tmp_path / "raw")) == 2)
    finally:
        stop.set()
        work.join(60)
    assert sorted(read_frame(tmp_path / "raw")["id"]) == [0, 1] and result[0].state == "done"


DYING = """
import os, random, signal, sys, json
import mlops_nb.ingestion.streaming as streaming
from mlops_nb.ingestion.streams import RedisStream
folder, config, point = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
if point == "before":
    streaming.commit_append = lambda *a: die()
elif point == "after":
    keep = streaming.commit_append
    streaming.commit_append = lambda *a: (keep(*a), die())
elif point == "told":
    tell = RedisStream.commit
    RedisStream.commit = lambda *a: (tell(*a), die())
streaming.ingest_stream(config, folder + "/raw", batches=100 if point != "none" else 2)
"""


@pytest.mark.drill
@pytest.mark.parametrize("point", ["before", "after", "told"])
def test_a_killed_stream_neither_loses_nor_doubles(redis_server, tmp_path, point):
    put(redis_server, *[json.dumps({"id": i}) for i in range(7)], "bad")
    dead = subprocess.run([sys.executable, "-c", DYING, str(tmp_path), json.dumps(stream_config(redis_server)), point], timeout=120)
    assert dead.returncode == -signal.SIGKILL
    put(redis_server, json.dumps({"id": 7}))
    stored = balanced(tmp_path / "raw")
    assert stored == (0 if point == "before" else 4)
    stop = threading.Event()
    work = threading.Thread(target=lambda: ingest_stream(stream_config(redis_server), tmp_path / "raw", stop=stop))
    work.start()
    try:
        wait(lambda: balanced(tmp_path / "raw") >= 9)
    finally:
        stop.set()
        work.join(60)
    assert sorted(read_frame(tmp_path / "raw")["id"]) == list(range(8)) and balanced(tmp_path / "raw") == 9


def test_kafka_commits_after_storing(tmp_path):
    "The broker is librdkafka's mock cluster; the store's position decides, whatever the broker believes"
    from confluent_kafka import Producer
    producer = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "mock"})
    producer.produce("flights", json.dumps({"id": 0}), partition=0)
    assert producer.flush(60) == 0
    broker = next(iter(producer.list_topics(timeout=60).brokers.values()))
    config = {"type": "kafka", "servers": f"{broker.host}:{broker.port}", "topic": "flights", "batch_rows": 4, "batch_seconds": 1,
              "settings": {"sasl.password": SECRET}}
    state = open_state(f"sqlite:///{tmp_path}/state.db")
    for i in range(1, 6):
        producer.produce("flights", json.dumps({"id": i}) if i != 3 else "bad", partition=i % 2)
    assert producer.flush(60) == 0

    def until(rows):
        stop = threading.Event()
        work = threading.Thread(target=lambda: ingest_stream(config, tmp_path / "raw", state=state, stop=stop))
        work.start()
        try:
            wait(lambda: balanced(tmp_path / "raw") >= rows)
        finally:
            stop.set()
            work.join(60)
    until(6)
    producer.produce("flights", json.dumps({"id": 6}), partition=0)
    assert producer.flush(60) == 0
    until(7)
    assert sorted(read_frame(tmp_path / "raw")["id"]) == [0, 1, 2, 4, 5, 6] and balanced(tmp_path / "raw") == 7
    assert SECRET not in history(state).to_csv() + str(events(state))


def test_a_full_disk_stops_nothing(redis_server, tmp_path, monkeypatch):
    "A batch that cannot be written is tried again from the stored position"
    import mlops_nb.ingestion.streaming as streaming
    real, failures = streaming.commit_append, [1, 2]

    def full(*args):
        if failures:
            failures.pop()
            raise OSError(28, "No space left on device")
        return real(*args)
    monkeypatch.setattr(streaming, "commit_append", full)
    put(redis_server, *[json.dumps({"id": i}) for i in range(3)])
    said = []
    run = ingest_stream(stream_config(redis_server, batch_rows=3), tmp_path / "raw", batches=1, say=said.append)
    assert run.rows == 3 and sum("No space left" in s for s in said) == 2 and balanced(tmp_path / "raw") == 3


@pytest.mark.drill
def test_a_process_stops_gracefully(redis_server, tmp_path):
    "SIGTERM: the batch at hand is stored, the record says done"
    import urllib.request
    (tmp_path / "params.yaml").write_text("ingest: " + json.dumps(stream_config(redis_server, batch_rows=1000, batch_seconds=60)) + "\n")
    put(redis_server, json.dumps({"id": 1}))
    command = [sys.executable, "-c", "from mlops_nb.cli import main; main()", "ingest", "stream", "--port", "0", "--out", "raw"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env={k: v for k, v in os.environ.items() if k != "MLOPS_NB_STATE_URL"})
    try:
        address = process.stdout.readline().split()[-1]
        import redis
        with redis.Redis.from_url(redis_server.url()) as client:
            wait(lambda: any(g["pending"] for g in client.xinfo_groups("flights")))
        assert b"mlops_nb_ingest_rows_total" in urllib.request.urlopen(address + "/metrics").read()
        process.terminate()
        out, _ = process.communicate(timeout=120)
        assert "1 read, 1 stored" in out and process.returncode == 0
    finally:
        process.kill()
    assert balanced(tmp_path / "raw") == 1


# ---- plug-ins


def test_a_plug_in_is_a_connector(tmp_path, monkeypatch):
    (tmp_path / "shopware.py").write_text("import pyarrow as pa\ndef extract(config): yield pa.table({'x': [1, 2]})\n")
    info = tmp_path / "shopware-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shopware\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mlops_nb.connectors]\nshopware = shopware:extract\nbroken = shopware:absent\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert ingest_batches({"type": "shopware"}, tmp_path / "raw").rows == 2
    assert isinstance(next(find_connector("shopware")({})), pa.Table)
    with pytest.raises(MlopsError, match="connector 'broken' .* cannot be loaded"):
        find_connector("broken")
