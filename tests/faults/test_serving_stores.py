"What a server asks while it answers: the feature store, the cache, the collector of traces; each may die, and callers are served. Long requests hold up nobody."
import http.server
import json
import threading
import time
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from load import ask, load
from sklearn.linear_model import LogisticRegression
from waiting import until

from mlops_nb.feature_store import FeatureStore, FeatureView
from mlops_nb.inference_log import InferenceLog
from mlops_nb.packaging import package
from mlops_nb.serving.server import running

PREDICT = "/v1/models/flights:predict"
VIEW = {"name": "weather", "entities": ["station"], "features": ["wind"], "ttl": "1h"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    "A model that says whether the wind is strong"
    x = pd.DataFrame({"temp": np.arange(50.0), "wind": np.arange(50.0) % 7})
    return package(LogisticRegression(C=1e6).fit(x, x.wind > 3), tmp_path_factory.mktemp("bundle") / "b", name="flights", sample=x).path


def keep(url, **winds):
    "Put the wind of some stations into the store, known since a minute ago"
    FeatureStore([FeatureView(time="t", source=None, **VIEW)], url).push("weather", [{"station": s, "t": time.time() - 60, "wind": w} for s, w in winds.items()])


def test_the_store_fills_in_by_entity_in_every_protocol(bundle, tmp_path):
    keep(str(tmp_path / ".mlops_nb/features.db"), S1=6.0, S2=0.0)
    features = {"missing": "default", "defaults": {"wind": 6.5}, "views": [VIEW]}
    tensor = lambda name, kind, values: {"name": name, "shape": [len(values)], "datatype": kind, "data": values}
    asked = {PREDICT: {"instances": [{"temp": 1, "station": s} for s in ("S1", "S2", "S3")]},
             "/v2/models/flights/infer": {"inputs": [tensor("temp", "FP64", [1, 1, 1]), tensor("station", "BYTES", ["S1", "S2", "S3"])]},
             "/invocations": {"dataframe_split": {"columns": ["temp", "station"], "data": [[1, "S1"], [1, "S2"], [1, "S3"]]}},
             "/predictions/flights": [{"temp": 1, "station": s} for s in ("S1", "S2", "S3")],
             "/api/v1/predict": {"rows": [{"temp": 1}] * 3, "entity": ["S1", {"station": "S2"}, "S3"]}}
    with running(bundle, root=str(tmp_path), features=features) as address:
        for path, body in asked.items():
            status, headers, told = ask(address, path, body)
            assert (status, headers["x-features-lacking"]) == (200, "wind=missing"), told
            answer = json.loads(told)
            answer = answer if isinstance(answer, list) else answer["outputs"][0]["data"] if "outputs" in answer else answer["predictions"]
            assert answer == [True, False, True]
        assert json.loads(told)["features"] == {"wind": "missing"}
        text = ask(address, "/metrics")[2].decode()
        assert 'feature_values_total{feature_name="wind",status="missing"} 5.0' in text and 'feature_age_seconds_count{view="weather"} 10.0' in text
        assert ask(address, PREDICT, {"instances": [{"temp": 1, "sation": "S1"}]})[0] == 400
    window = InferenceLog(f"sqlite:///{tmp_path}/.mlops_nb/inference.db").window()
    assert Counter(zip(window.entity, window.wind)) == {("S1", 6.0): 5, ("S2", 0.0): 5, ("S3", 6.5): 5}


@pytest.mark.drill
def test_the_feature_store_dies_and_comes_back(bundle, tmp_path, redis, monkeypatch):
    monkeypatch.setenv("MLOPS_NB_FEATURES_URL", redis.url())
    keep(redis.url(), S1=6.0)
    body, lacking = {"instances": [{"temp": 1.0, "station": "S1"}]}, lambda address: ask(address, PREDICT, body)[1].get("x-features-lacking")
    with running(bundle, root=str(tmp_path), features={"missing": "degrade", "views": [VIEW], "defaults": {"wind": 5.0}}) as address:
        with load(address, PREDICT, body, clients=2) as told:
            until(lambda: len(told.ids) > 100)
            until(lambda: lacking(address) is None)
            redis.kill()
            try:
                until(lambda: lacking(address) == "wind=away")
            finally:
                redis.start()
            keep(redis.url(), S1=6.0)
            until(lambda: lacking(address) is None)
    assert (told.broken, set(told.statuses)) == ([], {200})
    with InferenceLog(f"sqlite:///{tmp_path}/.mlops_nb/inference.db").transaction(only_reads=True) as c:
        found = Counter(c.exec_driver_sql("SELECT prediction_id FROM predictions").scalars())
    assert set(told.ids) <= set(found) and max(found.values()) == 1


@pytest.mark.drill
def test_a_shared_cache_dies_and_comes_back(bundle, tmp_path, redis, monkeypatch):
    monkeypatch.setenv("MLOPS_NB_CACHE_URL", redis.url())
    body = {"instances": [{"temp": 1.0, "wind": 6.0}]}
    hits = lambda address: sum(float(line.split()[-1]) for line in ask(address, "/metrics")[2].decode().splitlines() if line.startswith("model_cache_total") and 'result="hit"' in line)
    with running(bundle, root=str(tmp_path), cache=60) as address, load(address, PREDICT, body, clients=2) as told:
        until(lambda: hits(address) > 20)
        redis.kill()
        gone, before = time.perf_counter(), len(told.ids)
        try:
            until(lambda: len(told.ids) > before + 300)
            back = time.perf_counter()
        finally:
            redis.start()
        before = hits(address)
        until(lambda: hits(address) > before + 20)
    assert (told.broken, set(told.statuses), {t for _, t in told.versions}, told.held(gone, back)) == ([], {200}, {b'{"predictions":[true]}'}, [])


class Collector(http.server.BaseHTTPRequestHandler):
    "Takes spans as OTLP sends them"
    def do_POST(self):
        import gzip

        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
        data = self.rfile.read(int(self.headers["content-length"]))
        data = gzip.decompress(data) if self.headers.get("content-encoding") == "gzip" else data
        for r in ExportTraceServiceRequest.FromString(data).resource_spans:
            self.server.seen += [s for scope in r.scope_spans for s in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_): pass


def test_spans_reach_a_collector_within_their_callers_trace(bundle, tmp_path, monkeypatch):
    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    collector.seen = []
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with running(bundle, root=str(tmp_path)) as address:
        assert ask(address, PREDICT, {"instances": [{"temp": 1.0, "wind": 6.0}]}, {"traceparent": caller})[0] == 200
        assert ask(address, PREDICT, b"{", {"traceparent": "00-nonsense"})[0] == 400
    collector.shutdown()
    mine = [s for s in collector.seen if s.trace_id.hex() == caller[3:35]]
    outer = next(s for s in mine if s.name == "v1 predict")
    assert {s.name for s in mine if s.parent_span_id == outer.span_id} == {"read", "check", "model", "log"} and outer.parent_span_id.hex() == caller[36:52]
    facts = {a.key: a.value.string_value or a.value.int_value for a in outer.attributes}
    assert facts == {"http.request.method": "POST", "url.path": PREDICT, "model.name": "flights", "model.version": "1", "http.response.status_code": 200}
    assert any(a.key == "http.response.status_code" and a.value.int_value == 400 for s in collector.seen for a in s.attributes)


@pytest.mark.drill
def test_a_collector_that_is_away_costs_no_answer(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    with running(bundle, root=str(tmp_path), log=False) as address:
        with load(address, PREDICT, {"instances": [{"temp": 1.0, "wind": 6.0}]}, clients=2) as told:
            until(lambda: len(told.ids) > 300)
        process = address.process
    assert (told.broken, set(told.statuses), process.returncode) == ([], {200}, 0)


def test_long_requests_hold_up_nobody(bundle, tmp_path):
    rows = [{"temp": 1.0, "wind": 6.0}] * 100
    with running(bundle, root=str(tmp_path)) as address, load(address, PREDICT, {"instances": rows[:1]}, clients=1) as told:
        crowd, seconds = [], []

        def long(path, body):
            "A long request, and more of them until one was let in and one refused; how long each took that was let in"
            while True:
                start = time.perf_counter()
                crowd.append(answer := ask(address, path, body, seconds=600))
                seconds.extend([time.perf_counter() - start] * (answer[0] == 200))
                if {s for s, *_ in list(crowd)} >= {200, 503}: return
        threads = [threading.Thread(target=long, args=("/explain", {"rows": rows, "scale": "probability"})) for _ in range(8)]
        threads += [threading.Thread(target=long, args=("/batch", rows * 300))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        quick = list(told.seconds)
    assert {s for s, *_ in crowd} == {200, 503} and all(h["retry-after"] for s, h, _ in crowd if s == 503)
    assert (told.broken, set(told.statuses)) == ([], {200})
    assert np.median(quick) < np.median(seconds) / 2                    # a quick one that waits for long ones takes as long as they do
