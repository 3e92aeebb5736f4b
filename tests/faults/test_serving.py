"What breaks a server: kill -9, SIGTERM under load, the log's database gone, garbage and slowness from callers, bundles exchanged. Lost: 0, doubled: 0."
import contextlib
import gzip
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import jwt
import numpy as np
import pandas as pd
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from load import ask, load
from servers import free_port
from sklearn.dummy import DummyRegressor
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier
from waiting import until

from mlops_nb.core import MlopsError
from mlops_nb.inference_log import InferenceLog, Prediction
from mlops_nb.packaging import package
from mlops_nb.registry import promote, register
from mlops_nb.serving import auth, server
from mlops_nb.serving.protocols import Refused
from mlops_nb.serving.server import running
from mlops_nb.serving.shelf import parse_wanted
from mlops_nb.validation.schema import Schema

ROW = {"temp": 1.0, "wind": 6.0}
BODY = {"instances": [ROW]}
PREDICT = "/v1/models/flights:predict"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    "A small compiled model"
    x = pd.DataFrame({"temp": np.arange(50.0), "wind": np.arange(50.0) % 7})
    return package(LogisticRegression().fit(x, x.wind > 3), tmp_path_factory.mktemp("bundle") / "b", name="flights", sample=x).path


def stored(root):
    "How often each prediction is in the log"
    with InferenceLog(f"sqlite:///{root}/.mlops_nb/inference.db").transaction(only_reads=True) as c:
        return Counter(c.exec_driver_sql("SELECT prediction_id FROM predictions").scalars())


def nothing_lost(root, ids, unanswered=0):
    "Every answered prediction is in the log once; besides them at most what was written down when its answer could not be sent"
    found = stored(root)
    lost, doubled = set(ids) - set(found), [i for i, n in found.items() if n > 1]
    assert len(ids) > 50
    assert (len(lost), len(doubled)) == (0, 0)
    assert len(found) - len(set(ids)) <= unanswered


def children(pid):
    "Worker processes of a server: those that run the worker's program"
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"PPid:\t{pid}\n" in (p / "status").read_text() and b"_worker_main" in (p / "cmdline").read_bytes():
                found.append(int(p.name))
    return found


def resident(pid):
    "Megabytes in memory"
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


# Processes that die

def test_a_killed_worker_is_replaced_and_the_others_go_on(bundle, tmp_path):
    with running(bundle, root=str(tmp_path), workers=2) as address:
        with load(address, PREDICT, BODY) as told:
            for n in range(1, 4):
                until(lambda n=n: len(told.ids) > 300 * n and len(children(address.process.pid)) == 2)
                os.kill(children(address.process.pid)[0], signal.SIGKILL)
            until(lambda: len(children(address.process.pid)) == 2 and len(told.ids) > 1200)
        assert ask(address, "/ready")[0] == 200
    assert len(told.broken) <= 3 * 4 and set(told.statuses) == {200} and told.refused == []      # at most what each client had open there
    nothing_lost(tmp_path, told.ids, unanswered=12)


def test_what_a_killed_server_answered_is_in_the_log_when_the_next_has_run(bundle, tmp_path):
    with running(bundle, root=str(tmp_path)) as address, load(address, PREDICT, BODY) as told:
        until(lambda: len(told.ids) > 500)
        address.process.kill()
        address.process.wait()
    with running(bundle, root=str(tmp_path)):
        pass
    until(lambda: set(told.ids) <= set(stored(tmp_path)))
    nothing_lost(tmp_path, told.ids, unanswered=4)


def test_the_parent_of_several_workers_loads_no_model(tmp_path):
    x = pd.DataFrame({"temp": np.arange(60.0)})
    package(DecisionTreeClassifier(max_depth=2).fit(x, x.temp > 30), tmp_path / "trees", name="trees", sample=x)
    loaded = lambda pid: "onnxruntime" in Path(f"/proc/{pid}/maps").read_text()
    with running(tmp_path / "trees", root=str(tmp_path), workers=2, log=False) as address:
        until(lambda: [loaded(pid) for pid in children(address.process.pid)] == [True, True])
        assert not loaded(address.process.pid)


def test_a_first_worker_that_dies_while_it_loads_ends_the_server(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text("import os, sys\nif 'MLOPS_NB_SERVE' in os.environ: os._exit(7)\n")
    with pytest.raises(MlopsError, match="ended with 7 before"), running(bundle, root=str(tmp_path), workers=2):
        pass


@pytest.mark.parametrize("when", ["before", "while"])
def test_sigterm_comes_when_a_dead_worker_is_replaced(when, tmp_path, monkeypatch):
    workers = object.__new__(server._Workers)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    started = []

    def start():
        started.append(subprocess.Popen(["sleep", "600"]))
        if when == "while":
            workers.stop()
        return started[-1]

    def sleep(seconds, real=time.sleep):
        real(seconds)
        if when == "before" and seconds >= 0.1:
            workers.stop()
    workers.stopping, workers.processes, workers._start = False, [dead], start
    monkeypatch.setattr(server, "time", SimpleNamespace(sleep=sleep))
    watching = threading.Thread(target=workers.watch, daemon=True)
    watching.start()
    watching.join(60)
    assert not watching.is_alive()
    assert [p.wait(60) for p in started] == ([] if when == "before" else [-signal.SIGTERM])


def test_another_server_carries_the_log_too(bundle, tmp_path):
    (tmp_path / "ours.py").write_text(f"from mlops_nb.serving.server import create_app\ndef app(): return create_app({str(bundle)!r}, root={str(tmp_path)!r})\n")
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "uvicorn", "--factory", "ours:app", "--app-dir", str(tmp_path), "--port", str(port), "--workers", "2", "--log-level", "error"])
    address, ids = f"http://127.0.0.1:{port}", []

    def answered():
        "Whether it has answered; it takes a moment to be there"
        with contextlib.suppress(OSError):
            status, headers, _ = ask(address, PREDICT, BODY)
            ids.append(headers["x-prediction-ids"])
            return status == 200
    try:
        until(answered)
        until(lambda: (tmp_path / ".mlops_nb/inference.db").exists() and set(ids) <= set(stored(tmp_path)))
        assert answered()
    finally:
        process.terminate()
        process.wait(180)
    until(lambda: set(ids) <= set(stored(tmp_path)))               # after a last pass


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_under_load_fails_nobody(bundle, tmp_path, workers):
    with running(bundle, root=str(tmp_path), workers=workers, linger=0.3) as address:
        with load(address, PREDICT, BODY) as told:
            until(lambda: len(told.ids) > 300)
            address.process.send_signal(signal.SIGTERM)
            address.process.wait(180)
        assert address.process.returncode == 0
    assert (told.broken, set(told.statuses)) == ([], {200})
    nothing_lost(tmp_path, told.ids)


# What a server needs

def test_a_locked_log_holds_up_nobody(bundle, tmp_path):
    with running(bundle, root=str(tmp_path)) as address:
        with load(address, PREDICT, BODY) as told:
            until(lambda: len(told.ids) > 100)
            until(lambda: (tmp_path / ".mlops_nb/inference.db").exists())
            with contextlib.closing(sqlite3.connect(tmp_path / ".mlops_nb/inference.db", timeout=300)) as other:
                other.execute("BEGIN EXCLUSIVE")
                before, locked = len(told.ids), time.perf_counter()
                until(lambda: len(told.ids) > before + 1000)
                free = time.perf_counter()
                other.rollback()
    assert (told.broken, set(told.statuses), told.held(locked, free)) == ([], {200}, [])
    nothing_lost(tmp_path, told.ids)


def test_when_no_more_can_be_written_down_nothing_is_answered(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("MLOPS_NB_LOG_URL", "postgresql+psycopg://nobody@127.0.0.1:1/none")
    with running(bundle, root=str(tmp_path), log_bound=200_000) as address, load(address, PREDICT, BODY) as told:
        until(lambda: told.statuses[503] > 20)
        status, headers, body = ask(address, PREDICT, BODY)
        assert (status, headers["retry-after"]) == (503, "5") and b"127.0.0.1" not in body
        assert ask(address, "/v2/health/live")[0] == 200
    assert told.broken == [] and set(told.statuses) == {200, 503}


def test_a_spool_that_somebody_removes_is_made_again(bundle, tmp_path):
    with running(bundle, root=str(tmp_path)) as address:
        first = ask(address, PREDICT, BODY)[1]["x-prediction-ids"]
        until(lambda: first in stored(tmp_path))
        (tmp_path / ".mlops_nb/inference.spool").rename(tmp_path / "gone")
        shutil.rmtree(tmp_path / "gone")
        status, headers, _ = ask(address, PREDICT, BODY)
        assert status == 200
    assert {first, headers["x-prediction-ids"]} <= set(stored(tmp_path))


def test_documentation_costs_nothing_until_somebody_asks_for_it(bundle, tmp_path):
    program = f"""
import asyncio, sys
from mlops_nb.serving.server import Options, build_app
app = build_app(Options(models=[{str(bundle)!r}], root={str(tmp_path)!r}))
async def ask(path):
    told = []
    async def receive(): return {{"type": "http.request"}}
    async def send(message): told.append(message)
    await app({{"type": "http", "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "method": "GET", "headers": []}}, receive, send)
    return told[0]["status"], "fastapi" in sys.modules
print([asyncio.run(ask(path)) for path in ("/favicon.ico", "/ready", "/docs", "/openapi.json")])"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[(404, False), (200, False), (200, True), (200, True)]"


def test_no_registry_at_the_start_is_told_and_a_later_loss_is_survived(bundle, tmp_path):
    with pytest.raises(MlopsError, match="ended with 1"), running("models:/flights@champion", root=str(tmp_path)):
        pass
    register(bundle, root=tmp_path)
    with running("models:/flights@champion", root=str(tmp_path), every=0.1) as address:
        (tmp_path / ".mlops_nb/state.db").rename(tmp_path / "away.db")
        (tmp_path / ".mlops_nb/state.db").mkdir()
        until(lambda: b"model_load_failures_total 0" not in ask(address, "/metrics")[2])
        assert ask(address, PREDICT, BODY)[0] == 200
        (tmp_path / ".mlops_nb/state.db").rmdir()
        (tmp_path / "away.db").rename(tmp_path / ".mlops_nb/state.db")
        assert ask(address, PREDICT, BODY)[0] == 200


def constant(tmp_path, value, personal=()):
    "A model that says one number"
    x = pd.DataFrame({"temp": np.arange(50.0), "wind": np.arange(50.0) % 7})
    schema = Schema.infer(x)
    for name in personal:
        schema.columns[name].personal = True
    return package(DummyRegressor(strategy="constant", constant=value).fit(x, x.wind), tmp_path / f"b{value}", name="flights", sample=x, schema=schema).path


def test_a_bundle_exchanged_on_disk_is_refused_and_the_old_one_serves_on(tmp_path):
    first = register(constant(tmp_path, 1), root=tmp_path)
    second = register(constant(tmp_path, 2), root=tmp_path)
    from mlops_nb.registry import fetch_bundle
    with running("models:/flights@champion", root=str(tmp_path), every=0.1) as address:
        file = next(p for p in Path(fetch_bundle("flights", second.version, root=tmp_path)).rglob("manifest.json"))
        text = file.read_text()
        file.write_text(text.replace('"flights"', '"flighty"'))
        from mlops_nb.registry.store import open_registry_state, served, set_pointer
        row = served("flights", root=tmp_path)
        with open_registry_state(tmp_path).begin() as connection:
            set_pointer(connection, {k: v for k, v in {**row, "version": int(second.version), "digest": second.digest,
                                     "location": row["location"].replace(str(first.digest), str(second.digest)) if str(first.digest) in row["location"] else file.parent.as_uri()}.items() if k != "changed"})
        until(lambda: b"model_load_failures_total 0" not in ask(address, "/metrics")[2])
        assert json.loads(ask(address, PREDICT, BODY)[2]) == {"predictions": [1.0]}
        assert ask(address, "/ready")[0] == 200


def test_a_version_takes_its_place_with_its_log_rules_or_not_at_all(tmp_path, monkeypatch):
    paths = [constant(tmp_path, value, personal) for value, personal in ((1, ["temp"]), (2, ["wind"]))]
    app = server.build_app(server.Options(models=[str(paths[0])], root=str(tmp_path)))
    shelf, logged = app.shelf, lambda: app.log_door([Prediction("a", "flights", "1", 1.0, {"temp": 11.5, "wind": 21.0})])[0].features
    monkeypatch.setenv("MODEL_VERSION", "2")
    shelf.wanted[0], shelf._marks[0] = parse_wanted(str(paths[1])), ""       # it has moved
    with monkeypatch.context() as broken:
        broken.setattr(server, "_make_lookup", lambda *_: 1 / 0)
        for _ in range(2):
            assert not shelf.refresh()
            assert (shelf.table.find().version, logged()) == ("1", {"temp": "****", "wind": 21.0})
            assert "served on as it was: division by zero" in shelf.error
    seen, prepare = [], shelf._prepare
    shelf._prepare = lambda table: [prepare(table), seen.append((shelf.table.find().version, logged()))]
    assert shelf.refresh()
    assert shelf.table.find().version == "2"
    assert seen == [("1", {"temp": "****", "wind": "****"})]       # before the first answer of the new version, and with the columns of the old


@pytest.mark.drill
def test_fifty_moves_of_the_champion_under_load(tmp_path):
    versions = [str(register(constant(tmp_path, value), root=tmp_path).version) for value in (1, 2)]
    with running("models:/flights@champion", root=str(tmp_path), every=0.05, cache=60) as address:      # a remembered answer is never an older version's
        with load(address, PREDICT, BODY) as told:
            before = None
            for n in range(50):
                promote("flights", versions[(n + 1) % 2], root=tmp_path)
                until(lambda n=n: told.versions and told.versions[-1][0] == versions[(n + 1) % 2])
                if n == 9:
                    before = resident(address.process.pid)
            after = resident(address.process.pid)
    assert (told.broken, set(told.statuses)) == ([], {200})
    assert {(v, json.loads(t)["predictions"][0]) for v, t in told.versions} == {(versions[0], 1.0), (versions[1], 2.0)}
    assert after < before + 20
    nothing_lost(tmp_path, told.ids)


def test_redis_stands_still_or_dies_and_callers_are_served(bundle, tmp_path, redis, monkeypatch):
    monkeypatch.setenv("MLOPS_NB_CACHE_URL", redis.url())
    with running(bundle, root=str(tmp_path), limit="1000000/second") as address, load(address, PREDICT, BODY, clients=2) as told:
        until(lambda: len(told.ids) > 100)
        try:
            os.killpg(redis.process.pid, signal.SIGSTOP)
            times = [time.perf_counter()]
            for away in (lambda: None, lambda: os.killpg(redis.process.pid, signal.SIGCONT) or redis.kill()):
                away()
                before = len(told.ids)
                until(lambda before=before: len(told.ids) > before + 500)
                times.append(time.perf_counter())
        finally:
            redis.start()
    assert (told.broken, set(told.statuses), [told.held(*span) for span in pairwise(times)]) == ([], {200}, [[], []])


# What callers send

def hostile():
    "Bodies nobody should send, and the statuses that are right"
    deep = b"[" * 100_000
    bomb = gzip.compress(b"0" * (200 << 20), 1)
    yield "deep", deep, {}, {400}
    yield "deep in instances", b'{"instances":' + b"[" * 5000 + b"]" * 5000 + b"}", {}, {400}
    yield "not utf-8", b'{"instances":[{"temp":"\xff\xfe"}]}', {}, {400}
    yield "bomb", bomb, {"content-encoding": "gzip"}, {413}
    yield "half a gzip", gzip.compress(json.dumps(BODY).encode())[:-9], {"content-encoding": "gzip"}, {400}
    yield "not gzip", b"hello", {"content-encoding": "gzip"}, {400}
    yield "brotli", b"hello", {"content-encoding": "br"}, {415}
    yield "infinity", b'{"instances":[{"temp":Infinity,"wind":-Infinity}]}', {}, {200, 400}
    yield "huge number", b'{"instances":[{"temp":1e400,"wind":1}]}', {}, {200, 400}
    yield "huge integer", b'{"instances":[{"temp":' + b"9" * 5000 + b',"wind":1}]}', {}, {200, 400}
    yield "surrogate", b'{"instances":[{"temp":"\\ud800","wind":1}]}', {}, {400}
    for name, half in (("key", b'{"\\ud800":NaN}'), ("V1", b'{"instances":[{"\\ud800":NaN}]}'), ("V2", b'{"inputs":[{"name":"\\ud800","shape":[1],"datatype":"FP64","data":[NaN]}]}'),
                       ("model", b'{"row":{"temp":NaN,"wind":1},"model":"\\ud800"}'), ("feedback", b'{"prediction_id":"x","label":NaN,"feedback_id":"\\ud800"}')):
        yield f"half a character in a {name}", half, {}, {400}
    yield "a long entity", json.dumps({"rows": [ROW] * 200, "entity": "x" * 100_000}).encode(), {}, {400}
    yield "two gzips and garbage", gzip.compress(json.dumps(BODY).encode()) * 2 + b"more", {"content-encoding": "gzip"}, {400}
    yield "null byte", b'{"instances":[{"temp\\u0000":1,"wind":1}]}', {}, {400}
    yield "many keys", json.dumps({"instances": [{f"k{i}": i for i in range(50_000)}]}).encode(), {}, {400}
    yield "many rows", json.dumps({"instances": [ROW] * 20_000}).encode(), {}, {413}
    yield "duplicate keys", b'{"instances":[{"temp":1,"wind":1,"temp":2}]}', {}, {200, 400}
    yield "empty", b"", {}, {400}
    tensor = {"name": "temp", "shape": [1], "datatype": "FP64", "data": [1]}
    for key, value in (("datatype", ["FP64"]), ("datatype", {}), ("name", ["temp"]), ("name", {}), ("shape", [2**63]), ("shape", [True]), ("data", [[[[[]]]]]), ("parameters", [8]), ("parameters", {"binary_data_size": True})):
        yield f"tensor {key} {value}", json.dumps({"inputs": [{**tensor, key: value}]}).encode(), {}, {400}
    yield "a length of its own", json.dumps({"inputs": [tensor]}).encode(), {"inference-header-content-length": "²"}, {400}
    for value in ("Infinity", "NaN", "1e300", "true", "[1]", '"10000-01-01"'):
        yield f"time {value}", b'{"row":{"temp":1,"wind":1},"prediction_id":"x","label":null,"time":' + value.encode() + b"}", {}, {400}
    yield "parquet", b"PAR1" + b"\xff" * 100 + b"PAR1", {"content-type": "application/vnd.apache.parquet"}, {400}
    yield "strange length", b"{}", {"content-type": "application/x-nothing"}, {400, 415}
    for value in ("null", "1", '"x"', "[]", "{}", "[[]]", "[null]", '{"instances":null}', '{"instances":[1]}', '{"inputs":{"temp":1}}', '{"instances":[],"inputs":{}}'):
        yield value, value.encode(), {}, {400}


def test_nothing_a_caller_sends_is_our_error(bundle, tmp_path):
    paths = [PREDICT, "/v2/models/flights/infer", "/invocations", "/predictions/flights", "/predict", "/batch", "/feedback"]
    with running(bundle, root=str(tmp_path), log=False) as address:
        start = resident(address.process.pid)
        for path in paths:
            for name, body, headers, right in hostile():
                status, _, told = ask(address, path, body, headers)
                assert status < 500 and (path != PREDICT or status in right), (path, name, status, told[:300])
                assert all(word not in told for word in (b"Traceback", b"/mlops_nb", str(tmp_path).encode())), (path, name, told[:300])
        for path in ("/v1/models/none:predict", "/v1/models/flights/versions/99:predict", "/v1/models/flights/labels/none:predict", "/v2/models/none/infer", "/predictions/none", "/nowhere", "/v1/models/%00:predict"):
            assert ask(address, path, BODY)[0] == 404, path
        assert ask(address, PREDICT)[0] == 405
        assert ask(address, PREDICT, BODY)[0] == 200
        assert resident(address.process.pid) < start + 250


class Keys(BaseHTTPRequestHandler):
    "An identity provider that answers with `document` when `answers` is set, and else lets callers wait"
    document, answers, asked = b"", threading.Event(), []

    def do_GET(self):
        self.asked.append(self.path)
        self.answers.wait(600)
        with contextlib.suppress(OSError):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.document)

    def log_message(self, *_):
        pass


def test_a_provider_of_keys_that_hangs_holds_up_nobody(bundle, tmp_path, monkeypatch):
    private = ec.generate_private_key(ec.SECP256R1())
    Keys.document = json.dumps({"keys": [json.loads(jwt.algorithms.ECAlgorithm.to_jwk(private.public_key())) | {"kid": "k1", "alg": "ES256", "use": "sig"}]}).encode()
    token = lambda kid: {b"authorization": b"Bearer " + jwt.encode({"sub": "ann", "exp": time.time() + 60}, private, algorithm="ES256", headers={"kid": kid}).encode()}
    provider = ThreadingHTTPServer(("127.0.0.1", 0), Keys)
    threading.Thread(target=provider.serve_forever, daemon=True).start()
    monkeypatch.setattr(auth, "Provider", partial(auth.Provider, patience=0.3))
    by_key = {b"x-api-key": auth.add_key(tmp_path / "keys.yaml", "jobs").encode()}
    guard = auth.make_guard("0.0.0.0", str(tmp_path / "keys.yaml"), f"http://127.0.0.1:{provider.server_port}/jwks")

    keys = guard.tokens._provider

    def admitted(headers):
        "Who is let in, or the status"
        try:
            return guard.admit(headers, "10.0.0.1", "predict").name
        except Refused as e:
            return e.status
    try:
        until(lambda: "timed out" in keys.error and not keys._thread.is_alive() and len(Keys.asked) == 1)
        keys.patience = keys._client.timeout = 1000              # a caller who waited for the next answer would wait until `answers` is set
        keys._tried = -1e9                                       # time to ask again
        assert [admitted(token(f"guess{i}")) for i in range(50)] == [503] * 50
        until(lambda: len(Keys.asked) == 2)
        assert [admitted(token(f"guess{i}")) for i in range(50)] == [503] * 50
        assert admitted(by_key) == "jobs" and len(Keys.asked) == 2
        Keys.answers.set()
        until(lambda: admitted(token("k1")) == "ann")
        assert admitted(token("other")) == 401
        keys._thread.join()
        provider.shutdown()
        provider.server_close()
        keys._fetched = keys._tried = -1e9                       # five minutes have passed
        until(lambda: [admitted(token("k1")), keys.error != ""] == ["ann", True])
        assert [admitted(token("k1")), admitted(token("k2")), admitted(by_key)] == ["ann", 503, "jobs"]
    finally:
        Keys.answers.set()
        provider.server_close()


def raw(address):
    "A connection"
    return socket.create_connection(urlsplit(address).netloc.split(":"), 100)


def test_a_head_is_bounded_in_size_and_time(bundle, tmp_path):
    with running(bundle, root=str(tmp_path), log=False, settings={"body_seconds": 1}) as address:
        start = resident(address.process.pid)
        with raw(address) as s, contextlib.suppress(OSError):
            s.sendall(b"GET /health HTTP/1.1\r\nx: ")
            for _ in range(200):
                s.sendall(b"a" * (1 << 20))
            raise AssertionError("two hundred megabytes of one header were taken")
        with raw(address) as s:
            s.sendall(b"GET /health HTTP/1.1\r\nx: y")
            assert b" 408 " in s.recv(200)
        assert resident(address.process.pid) < start + 50 and ask(address, PREDICT, BODY)[0] == 200


def test_requests_in_a_row_are_each_answered(bundle, tmp_path):
    with running(bundle, root=str(tmp_path), log=False) as address:
        with raw(address) as s:
            body = json.dumps(BODY).encode()
            good = f"POST {PREDICT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
            s.sendall((good + f"POST {PREDICT} HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nhello".encode()) * 20 + b"GET /health HTTP/1.1\r\nconnection: close\r\n\r\n")
            told = b"".join(iter(lambda: s.recv(1 << 16), b""))
        assert [told.count(b"HTTP/1.1 " + code) for code in (b"200", b"400")] == [21, 20]


def test_a_body_of_a_gigabyte_is_refused_before_it_is_read(bundle, tmp_path):
    head = f"POST {PREDICT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with running(bundle, root=str(tmp_path), log=False) as address:
        with raw(address) as s:
            s.sendall(head.encode() + b"content-length: 1073741824\r\n\r\n")
            assert b" 413 " in s.recv(200)
        with raw(address) as s:
            s.sendall(head.encode() + b"transfer-encoding: chunked\r\n\r\n")
            sent, chunk = 0, b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
            with contextlib.suppress(OSError):
                while sent < 1024:
                    s.sendall(chunk)
                    sent += 1
            assert sent < 200
        assert resident(address.process.pid) < 300 and ask(address, PREDICT, BODY)[0] == 200


def test_a_slow_caller_is_let_go_and_holds_up_nobody(bundle, tmp_path):
    with running(bundle, root=str(tmp_path), log=False, settings={"body_seconds": 5}) as address:
        slow = [raw(address) for _ in range(50)]
        for s in slow:
            s.sendall(f"POST {PREDICT} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{".encode())
        assert ask(address, PREDICT, BODY)[0] == 200
        assert select.select(slow, [], [], 0)[0] == []                        # all of them were still waited for
        assert all(b" 408 " in s.recv(200) for s in slow)
        for s in slow:
            s.close()


@pytest.mark.drill
def test_ten_thousand_idle_connections(bundle, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 10_000
    if hard != resource.RLIM_INFINITY and hard < wanted + 500:
        pytest.skip(f"only {hard} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with running(bundle, root=str(tmp_path), log=False) as address:
        with load(address, PREDICT, BODY) as alone:
            until(lambda: len(alone.ids) > 500)
        idle = [raw(address) for _ in range(wanted)]
        with load(address, PREDICT, BODY) as told:
            until(lambda: len(told.ids) > 500)
        assert (told.broken, set(told.statuses)) == ([], {200}) and min(told.seconds) < 10 * min(alone.seconds)
        assert resident(address.process.pid) < 600
        for s in idle:
            s.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_clock_that_jumps_back_doubles_no_id(bundle, tmp_path, monkeypatch):
    from mlops_nb.inference_log.records import new_id
    seen = {new_id() for _ in range(1000)}
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    seen |= {new_id() for _ in range(1000)}
    assert len(seen) == 2000


@pytest.mark.drill
def test_memory_stays_flat_under_load(bundle, tmp_path):
    with running(bundle, root=str(tmp_path)) as address, load(address, PREDICT, BODY) as told:
        until(lambda: len(told.ids) > 10_000, 600)
        before = resident(address.process.pid)
        until(lambda: len(told.ids) > 100_000, 3000)
        assert resident(address.process.pid) < before + 15
    assert (told.broken, set(told.statuses)) == ([], {200})
    shutil.rmtree(tmp_path / ".mlops_nb", ignore_errors=True)
