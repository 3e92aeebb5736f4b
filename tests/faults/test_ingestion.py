"Ingestion against real sources that fail: kills at any point, servers that misbehave, disks and messages that are bad; nothing lost, nothing doubled, no secret written down."
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
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
from mlops_nb.ingestion.streaming import StreamStatus, ingest_stream

sys.path.append(str(Path(__file__).resolve().parents[1]))
from servers import Postgres, Redis, binary, small_disk  # noqa: E402
from waiting import until

SECRET = "pl4nted-s3cret"


def balanced(store):
    "Every manifest accounts for what was read"
    found = manifests(store)
    assert all(m["read"] == m["rows"] + m["quarantined"] + sum(m["dropped"].values()) for m in found)
    return sum(m["read"] for m in found)


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
    "Not before the client has hung up"
    handler.connection.recv(1)
    return 200, b"[]", {}


GOOD = (200, b'[{"id": 1}, {"id": 2}]', {})


@pytest.mark.parametrize("bad", [(429, b"", {"Retry-After": "0"}), (500, b"oops", {}), (503, b"", {}), (200, b'[{"id"', {"Content-Length": 500}), slow],
                         ids=["429", "500", "503", "truncated", "slow"])
def test_an_api_that_recovers(api, tmp_path, bad):
    api.answers += [bad, bad, GOOD]
    run = ingest_batches({"type": "api", "url": api.url, "timeout": 2 if bad is slow else 60, "retries": 9, "backoff": 0.01}, tmp_path / "raw")
    assert (run.read, run.rows) == (2, 2) and balanced(tmp_path / "raw") == 2
    assert len(api.asked) == 3 or bad is slow and len(api.asked) > 3        # whoever waits two seconds at most may have to ask a busy machine once more


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
import json, os, signal, sys
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
batch.ingest_batches(json.loads(sys.argv[3]), f"{folder}/raw", state=open_state(f"sqlite:///{folder}/state.db"), root=folder)
"""


@pytest.mark.drill
@pytest.mark.parametrize("kind", ["database", "file"])
@pytest.mark.parametrize("point", ["before", "after", "recorded"])
def test_a_killed_run_neither_loses_nor_doubles(tmp_path, point, kind):
    config = {"type": "database", "url": f"sqlite:///{tmp_path}/shop.db", "table": "sales", "watermark": "id"} if kind == "database" else {"type": "file", "path": "in/*", "mode": "append"}
    (tmp_path / "in").mkdir()
    with sqlite3.connect(tmp_path / "shop.db") as c:
        c.execute("CREATE TABLE sales (id INTEGER)")
        c.executemany("INSERT INTO sales VALUES (?)", [(i,) for i in range(10)])
    for name, ids in (("a", range(5)), ("b", range(5, 10))):
        (tmp_path / "in" / f"{name}.csv").write_text("id\n" + "".join(f"{i}\n" for i in ids))
    assert subprocess.run([sys.executable, "-c", KILLED, point, str(tmp_path), json.dumps(config)], timeout=600).returncode == -signal.SIGKILL
    with sqlite3.connect(tmp_path / "shop.db") as c:
        c.execute("INSERT INTO sales VALUES (10)")
    with (tmp_path / "in" / "b.csv").open("a") as file:
        file.write("10\n")
    state = open_state(f"sqlite:///{tmp_path}/state.db")
    ingest_batches(config, tmp_path / "raw", state=state, root=tmp_path)
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


def by_number(server, *numbers):
    "Messages whose ids are numbers, as a replay or a copy has them"
    import redis
    with redis.Redis.from_url(server.url()) as client:
        for i in numbers:
            client.xadd("flights", {"data": json.dumps({"id": i})}, id=f"{i}-0")


def test_a_redis_stream_that_was_made_anew_is_told(redis_server, tmp_path):
    by_number(redis_server, 100, 101)
    assert ingest_stream(stream_config(redis_server), tmp_path / "raw", batches=1).rows == 2
    stop, said, status = threading.Event(), [], StreamStatus("redis")
    work = threading.Thread(target=lambda: ingest_stream(stream_config(redis_server, max_pause=0.2), tmp_path / "raw", stop=stop, status=status, say=said.append))
    work.start()
    try:
        until(lambda: not status.error)
        import redis
        with redis.Redis.from_url(redis_server.url()) as client:
            client.delete("flights")
        by_number(redis_server, 1, 2)
        until(lambda: "newest entry 2-0 is before the stored position 101-0" in status.error and "another folder" in said[-1])
        by_number(redis_server, 102)                       # what comes behind the position is read
        until(lambda: balanced(tmp_path / "raw") == 3 and not status.error)
    finally:
        stop.set()
        work.join(60)


def test_redis_entries_that_were_trimmed_are_told_once(redis_server, tmp_path):
    import redis
    state, said = open_state(f"sqlite:///{tmp_path}/state.db"), []
    by_number(redis_server, *range(1, 5))
    assert ingest_stream(stream_config(redis_server), tmp_path / "raw", batches=1).rows == 4
    with redis.Redis.from_url(redis_server.url()) as client:
        by_number(redis_server, *range(5, 9))
        client.xreadgroup("mlops-nb", "mlops-nb", {"flights": ">"}, 1)                       # 5 was delivered and not stored, as after a crash
        client.xtrim("flights", minid="7-0", approximate=False)
        run = ingest_stream(stream_config(redis_server), tmp_path / "raw", state=state, batches=1, say=said.append)
        assert (run.read, run.rows, run.quarantined) == (3, 2, 1)
        client.xtrim("flights", maxlen=0, approximate=False)
    by_number(redis_server, 9)
    run = ingest_stream(stream_config(redis_server), tmp_path / "raw", batches=1, say=said.append)
    assert run.rows == 1 and [s for s in said if "1 entries were deleted before they were read" in s] == [s for s in said if "failed" in s] and len([s for s in said if "failed" in s]) == 1
    assert "1 entries were deleted" in history(state)["notes"].iloc[-1][0]
    assert [json.loads(p.read_text())["_reasons"] for p in (tmp_path / "raw").glob("*/_quarantine.jsonl")] == ["was deleted from the stream before it was stored"]
    assert sorted(read_frame(tmp_path / "raw")["id"]) == [1, 2, 3, 4, 7, 8, 9]


POISON = ['{"a": "\\ud800"}', '{"\\ud800": 1}', '{"c": 1' + "0" * 400 + "}", '{"a": {}}', '{"a": [{}]}', '{"b": ' + "[" * 900 + "]" * 900 + "}", "{}", "[" * 100_000, '{"a": "x"}']


def test_no_message_ends_a_stream(redis_server, tmp_path):
    "Each alone, and all in one batch among good ones: what cannot be stored is set aside with its reason, the rest is stored, nothing is read twice"
    put(redis_server, *POISON)
    run = ingest_stream(stream_config(redis_server, batch_rows=1), tmp_path / "alone", batches=len(POISON))
    assert (run.read, run.rows, run.quarantined) == (9, 4, 5) and balanced(tmp_path / "alone") == 9
    put(redis_server, json.dumps({"a": 1}), *POISON, json.dumps({"a": 2}))
    run = ingest_stream(stream_config(redis_server, batch_rows=20), tmp_path / "alone", batches=1)
    assert (run.read, run.rows, run.quarantined) == (11, 6, 5) and balanced(tmp_path / "alone") == 20
    told = [json.loads(line)["_reasons"] for p in (tmp_path / "alone").glob("*/_quarantine.jsonl") for line in p.read_text().splitlines()]
    assert len(told) == 10 and all(any(w in t for w in ("surrogates", "int too large", "without keys", "not JSON")) for t in told)


def test_no_line_and_no_record_ends_a_run(api, tmp_path):
    "The same in a file and from a server"
    (tmp_path / "in.jsonl").write_text("\n".join(['{"a": 1}', *POISON]) + "\n")
    run = ingest_batches({"type": "file", "path": str(tmp_path / "in.jsonl")}, tmp_path / "file")
    assert (run.read, run.rows, run.quarantined) == (10, 5, 5) and balanced(tmp_path / "file") == 10
    (tmp_path / "in.jsonl").write_text('{"a": {}}\n')      # what Arrow's parser takes and Parquet does not
    assert ingest_batches({"type": "file", "path": str(tmp_path / "in.jsonl")}, tmp_path / "empty").rows == 1
    api.answers.append((200, ("[" + ",".join(p for p in POISON if p[0] == "{") + "]").encode(), {}))
    run = ingest_batches({"type": "api", "url": api.url}, tmp_path / "api")
    assert (run.read, run.rows, run.quarantined) == (8, 4, 4) and balanced(tmp_path / "api") == 8


@pytest.mark.drill
def test_redis_dies_while_we_read(redis_server, tmp_path):
    stop, said, result = threading.Event(), [], []
    put(redis_server, json.dumps({"id": 0}))
    work = threading.Thread(target=lambda: result.append(ingest_stream(stream_config(redis_server, max_pause=0.2), tmp_path / "raw", stop=stop, say=said.append)))
    work.start()
    try:
        until(lambda: len(manifests(tmp_path / "raw")) == 1)
        redis_server.kill()
        until(lambda: any("failed" in s for s in said))
        redis_server.start()
        put(redis_server, json.dumps({"id": 1}))
        until(lambda: len(manifests(tmp_path / "raw")) == 2)
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
    dead = subprocess.run([sys.executable, "-c", DYING, str(tmp_path), json.dumps(stream_config(redis_server)), point], timeout=600)
    assert dead.returncode == -signal.SIGKILL
    put(redis_server, json.dumps({"id": 7}))
    stored = balanced(tmp_path / "raw")
    assert stored == (0 if point == "before" else 4)
    stop = threading.Event()
    work = threading.Thread(target=lambda: ingest_stream(stream_config(redis_server), tmp_path / "raw", stop=stop))
    work.start()
    try:
        until(lambda: balanced(tmp_path / "raw") >= 9)
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
    broker = next(iter(producer.list_topics(timeout=300).brokers.values()))
    config = {"type": "kafka", "servers": f"{broker.host}:{broker.port}", "topic": "flights", "batch_rows": 4, "batch_seconds": 1,
              "settings": {"sasl.password": SECRET}}
    state = open_state(f"sqlite:///{tmp_path}/state.db")
    for i in range(1, 6):
        producer.produce("flights", json.dumps({"id": i}) if i != 3 else "bad", partition=i % 2)
    assert producer.flush(60) == 0

    def read_until(rows):
        stop = threading.Event()
        work = threading.Thread(target=lambda: ingest_stream(config, tmp_path / "raw", state=state, stop=stop))
        work.start()
        try:
            until(lambda: balanced(tmp_path / "raw") >= rows)
        finally:
            stop.set()
            work.join(60)
    read_until(6)
    producer.produce("flights", json.dumps({"id": 6}), partition=0)
    assert producer.flush(60) == 0
    read_until(7)
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
            until(lambda: any(g["pending"] for g in client.xinfo_groups("flights")))
        assert b"mlops_nb_ingest_rows_total" in urllib.request.urlopen(address + "/metrics").read()
        process.terminate()
        out, _ = process.communicate(timeout=600)
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


# ---- files


def workbook(path, **sheets):
    "Write sheets, each a list of rows, as a workbook"
    import zipfile
    cell = lambda at, v: "" if v is None else f'<c r="{at}"><v>{v}</v></c>' if not isinstance(v, str) else f'<c r="{at}" t="inlineStr"><is><t>{v}</t></is></c>'
    row = lambda n, values: f'<row r="{n}">' + "".join(cell(f"{'ABC'[i]}{n}", v) for i, v in enumerate(values)) + "</row>"
    doc, part, rel = "http://schemas.openxmlformats.org/officeDocument/2006/relationships", "application/vnd.openxmlformats-officedocument.spreadsheetml", "http://schemas.openxmlformats.org/package/2006"
    each = list(enumerate(sheets, 1))
    parts = {"[Content_Types].xml": f'<Types xmlns="{rel}/content-types"><Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
             f'<Override PartName="/xl/workbook.xml" ContentType="{part}.sheet.main+xml"/>' + "".join(f'<Override PartName="/xl/s{i}.xml" ContentType="{part}.worksheet+xml"/>' for i, _ in each) + "</Types>",
             "_rels/.rels": f'<Relationships xmlns="{rel}/relationships"><Relationship Id="r1" Type="{doc}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
             "xl/workbook.xml": f'<workbook xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main" xmlns:r="{doc}"><sheets>'
             + "".join(f'<sheet name="{n}" sheetId="{i}" r:id="r{i}"/>' for i, n in each) + "</sheets></workbook>",
             "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{rel}/relationships">' + "".join(f'<Relationship Id="r{i}" Type="{doc}/worksheet" Target="s{i}.xml"/>' for i, _ in each) + "</Relationships>"}
    parts |= {f"xl/s{i}.xml": '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>'
              + "".join(row(n, values) for n, values in enumerate(sheets[name], 1)) + "</sheetData></worksheet>" for i, name in each}
    with zipfile.ZipFile(path, "w") as book:
        for name, text in parts.items():
            book.writestr(name, '<?xml version="1.0"?>' + text)


def test_excel(tmp_path):
    "A workbook, one in a URL's file system, one of two sheets with a title above the header, and one that is none"
    sold = [["shop", "sold"], ["Zürich", 3], [None, 4.5]]
    workbook(tmp_path / "a.xlsx", S=sold)
    run = ingest_batches({"type": "file", "path": f"file://{tmp_path}/a.xlsx"}, tmp_path / "raw")
    assert run.rows == 2 and read_frame(tmp_path / "raw").sort_values("sold")["sold"].tolist() == [3, 4.5] and read_frame(tmp_path / "raw")["shop"].isna().sum() == 1
    workbook(tmp_path / "two.xlsx", S=sold, T=[["Report"], ["shop", "sold"], ["Bern", 1]])
    two = {"type": "file", "path": str(tmp_path / "two.xlsx")}
    assert "the first of 2 sheets was read; ingest.sheet takes another: S, T" in ingest_batches(two, tmp_path / "two").notes[0]
    assert "ingest.skip" in ingest_batches({**two, "sheet": "T"}, tmp_path / "two").notes[0]
    run = ingest_batches({**two, "sheet": 1, "skip": 1}, tmp_path / "two")
    assert not run.notes and read_frame(tmp_path / "two")["shop"].tolist() == ["Bern"]
    with pytest.raises(MlopsError, match="no sheet 'U'; there is: S, T"):
        ingest_batches({**two, "sheet": "U"}, tmp_path / "two")
    workbook(tmp_path / "codes.xlsx", S=[["zip", "sold", "n"], ["00501", "3", 7], ["10001", "4.5", None]])         # texts stay texts, unless declared
    ingest_batches({"type": "file", "path": str(tmp_path / "codes.xlsx"), "types": {"sold": "number"}}, tmp_path / "codes")
    back = read_frame(tmp_path / "codes")
    assert back["zip"].tolist() == ["00501", "10001"] and back["sold"].tolist() == [3, 4.5] and back["n"].dropna().tolist() == [7]
    (tmp_path / "b.xlsx").write_bytes((tmp_path / "a.xlsx").read_bytes()[:200])
    with pytest.raises(MlopsError, match=r"b\.xlsx: cannot be read as excel .*damaged"):
        ingest_batches({"type": "file", "path": str(tmp_path / "b.xlsx")}, tmp_path / "raw")


def test_globs_urls_compression_and_drift_between_files(tmp_path):
    import gzip

    import fsspec
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.csv").write_text("x,y\n1,a\n")
    (tmp_path / "in/b.csv.gz").write_bytes(gzip.compress(b"x,z\n1.5,b\nbad\n"))
    (tmp_path / "in/c.csv").write_text("nobody,asked\n")
    config = {"type": "file", "path": str(tmp_path / "in/[ab].csv*")}
    run = ingest_batches(config, tmp_path / "raw")
    assert (run.read, run.rows, run.quarantined) == (3, 2, 1) and balanced(tmp_path / "raw") == 3
    assert [any(w in n for n in run.notes) for w in ("no column 'y'", "column 'z'", "column 'x' holds double")] == [True] * 3
    with pytest.raises(MlopsError, match="b.csv.gz: no column 'y'.*need the same columns"):
        ingest_batches({**config, "drift": "refuse"}, tmp_path / "raw")
    with fsspec.open("memory://shop/2024.jsonl.gz", "wb", compression="gzip") as file:
        file.write(b'{"x": 1}\n{"x"\n[1]\n')
    run = ingest_batches({"type": "file", "path": "memory://shop/*.jsonl.gz"}, tmp_path / "memory")
    assert (run.read, run.rows, run.quarantined) == (3, 1, 2)


# ---- a disk that is full, two runs at once, a database taken away


@pytest.fixture
def full_disk(tmp_path):
    "A file system of 600 KB"
    with small_disk(tmp_path / "disk", "600k") as place:
        yield place


def big(path, rows=150_000):
    "Numbers that do not compress"
    import random
    random.seed(0)
    path.write_text("x\n" + "\n".join(str(random.random()) for _ in range(rows)))


def test_a_disk_that_is_full_leaves_what_was_stored(full_disk, tmp_path):
    (tmp_path / "small.csv").write_text("x\n1\n")
    big(tmp_path / "big.csv")
    state = open_state(f"sqlite:///{tmp_path}/state.db")
    run = ingest_batches({"type": "file", "path": str(tmp_path / "small.csv")}, full_disk / "raw", state=state)
    with pytest.raises((MlopsError, OSError), match="No space left"):
        ingest_batches({"type": "file", "path": str(tmp_path / "big.csv")}, full_disk / "raw", state=state)
    assert read_frame(full_disk / "raw")["x"].tolist() == [1] and run.rows == 1
    assert history(state)["state"].tolist() == ["done", "failed"] and "No space left" in history(state)["error"].iloc[-1]
    assert [p.name for p in full_disk.iterdir()] == ["raw"]


def test_a_stream_waits_for_space(full_disk, redis_server, tmp_path):
    "The disk is full at first; when there is space again, each message lands once"
    (full_disk / "filler").write_bytes(b"x" * 595_000)
    put(redis_server, *[json.dumps({"id": i, "text": os.urandom(3000).hex()}) for i in range(8)])
    said, stop, done = [], threading.Event(), []
    work = threading.Thread(target=lambda: done.append(ingest_stream(stream_config(redis_server, max_pause=0.2), full_disk / "raw", stop=stop, say=said.append)))
    work.start()
    try:
        until(lambda: any("No space left" in s for s in said))
        (full_disk / "filler").unlink()
        until(lambda: balanced(full_disk / "raw") == 8)
    finally:
        stop.set()
        work.join(60)
    assert sorted(read_frame(full_disk / "raw")["id"]) == list(range(8)) and done[0].rows == 8


def test_two_runs_at_once(api, tmp_path):
    "The second is refused at once and records that it was; the first is not disturbed"
    started, go = threading.Event(), threading.Event()

    def held(handler):
        started.set()
        go.wait(600)
        return GOOD
    api.answers.append(held)
    result = []
    work = threading.Thread(target=lambda: result.append(ingest_batches({"type": "api", "url": api.url, "timeout": 600}, tmp_path / "raw")))
    work.start()
    assert started.wait(180)
    with pytest.raises(MlopsError, match="another ingestion into this folder is running"):
        ingest_batches({"type": "api", "url": api.url}, tmp_path / "raw")
    (tmp_path / "in.csv").write_text("x\n1\n")
    assert ingest_batches({"type": "file", "path": str(tmp_path / "in.csv")}, tmp_path / "other").rows == 1     # another store is another lock
    go.set()
    work.join(180)
    assert result[0].rows == 2 and balanced(tmp_path / "raw") == 2 and not list(tmp_path.glob(".*"))


@pytest.mark.drill
def test_a_database_taken_away_while_it_is_read(tmp_path):
    "What was stored stays; the next run reads all"
    import sqlalchemy as sa
    if not binary("initdb"):
        pytest.skip("PostgreSQL is not installed")
    server = Postgres().start()
    try:
        engine = sa.create_engine(server.new_database(), poolclass=sa.NullPool)
        with engine.begin() as c:
            c.execute(sa.text("CREATE TABLE s AS SELECT i AS id, repeat('x', 500) AS pad FROM generate_series(1, 50000) i"))
        config = {"type": "database", "url": engine.url.render_as_string(hide_password=False), "table": "s", "watermark": "id", "batch_rows": 500}
        rows = find_connector("database")({**config})
        next(rows)
        server.kill()
        with pytest.raises(MlopsError, match="^database: "):
            list(rows)
        server.start()
        assert ingest_batches(config, tmp_path / "raw").rows == 50_000 and balanced(tmp_path / "raw") == 50_000
    finally:
        server.close()


# ---- watched


def test_health_and_metrics_of_a_stream(redis_server, tmp_path):
    "Healthy while it works, 503 with the reason while the source is away, healthy again"
    import urllib.error
    import urllib.request

    from mlops_nb.ingestion.streaming import StreamStatus, serve_status

    def health(port):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as e:
            return e.code, json.load(e)
    status, stop = StreamStatus("redis"), threading.Event()
    put(redis_server, *[json.dumps({"id": i}) for i in range(3)], "bad")
    with serve_status(status, "127.0.0.1", 0) as port:
        assert health(port)[0] == 503
        work = threading.Thread(target=lambda: ingest_stream(stream_config(redis_server, max_pause=0.1), tmp_path / "raw", stop=stop, status=status))
        work.start()
        try:
            until(lambda: health(port)[0] == 200 and balanced(tmp_path / "raw") == 4)
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
            for line in ('rows_total{fate="read",source="redis"} 4.0', 'rows_total{fate="stored",source="redis"} 3.0', 'rows_total{fate="quarantined",source="redis"} 1.0', 'lag{source="redis"} 0.0'):
                assert f"mlops_nb_ingest_{line}" in text
            redis_server.kill()
            until(lambda: health(port)[0] == 503)
            assert health(port)[1]["error"] and 'failures_total{reason="source",source="redis"}' in urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
            redis_server.start()
            put(redis_server, json.dumps({"id": 9}))
            until(lambda: health(port)[0] == 200 and balanced(tmp_path / "raw") == 5)
        finally:
            stop.set()
            work.join(60)


@pytest.mark.drill
def test_an_installed_package_brings_a_connector(tmp_path):
    "A package made, installed by pip, and named in params.yaml; the command line uses and records it"
    package = tmp_path / "package"
    package.mkdir()
    (package / "pyproject.toml").write_text('[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n[project]\nname = "tideware"\nversion = "1.0"\n'
                                            '[project.entry-points."mlops_nb.connectors"]\ntides = "tideware:extract"\n[tool.setuptools]\npy-modules = ["tideware"]\n')
    (package / "tideware.py").write_text("import pyarrow as pa\ndef extract(config): yield pa.table({'harbour': [config['harbour']] * 2, 'metres': [1.5, 2.5]})\n")
    subprocess.run([Path(sys.executable).parent / "uv", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--python", sys.executable, "--target", tmp_path / "site", package], check=True, timeout=300)
    (tmp_path / "params.yaml").write_text("ingest: {type: tides, harbour: Hull, password: " + SECRET + "}\n")
    env = {**{k: v for k, v in os.environ.items() if k != "MLOPS_NB_STATE_URL"}, "PYTHONPATH": str(tmp_path / "site")}
    run = lambda *words: subprocess.run([sys.executable, "-c", "from mlops_nb.cli import main; main()", "ingest", *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    done = run("run")
    assert done.returncode == 0 and read_frame(tmp_path / "data/raw")["harbour"].tolist() == ["Hull"] * 2, done.stderr
    told = run("history", "--json").stdout
    assert json.loads(told)[0]["rows"] == 2 and SECRET not in told + done.stdout + done.stderr
