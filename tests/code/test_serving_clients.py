"The server, spoken to by the clients that people have: Triton's, KServe's, the Open Inference Protocol's, MLflow's; and a fuzzer on its document."
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from load import ask
from sklearn.ensemble import IsolationForest
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier

from mlops_nb.features import make_preprocessor
from mlops_nb.packaging import package
from mlops_nb.serving.server import running

FRAME = pd.DataFrame({"temp": np.arange(60.0), "wind": np.arange(60.0) % 7, "town": ["Cork", "Brest", "Ulm"] * 20})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    "The address of a server with two models: labels of text, and a regression"
    folder = tmp_path_factory.mktemp("served")
    kinds = {"temp": "number", "wind": "number", "town": "category"}
    late = np.where(FRAME.temp + 10 * (FRAME.town == "Cork") > 35, "late", "on time")
    for name, last, y in (("flights", LogisticRegression(), late), ("delay", LinearRegression(), FRAME.temp)):
        model = Pipeline([("prepare", make_preprocessor(kinds, "linear")), ("model", last)]).fit(FRAME, y)
        package(model, folder / name, name=name, sample=FRAME)
    with running(folder / "flights", folder / "delay", root=str(folder)) as address:
        yield address


def by(environment, program, address):
    "What a program says that runs in another environment"
    import peers
    done = subprocess.run([peers.python_of(environment), "-c", program, address], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


TRITON = """
import json, sys
import numpy as np, tritonclient.http as triton
from tritonclient.utils import InferenceServerException
client = triton.InferenceServerClient(sys.argv[1].removeprefix("http://"))
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("flights") and not client.is_model_ready("none")
told = {"server": client.get_server_metadata()["name"], "model": client.get_model_metadata("flights")["name"], "index": [m["name"] for m in client.get_model_repository_index()]}
columns = {"temp": (np.array([1., 50.]), "FP64"), "wind": (np.array([1, 2]), "INT64"), "town": (np.array(["Cork", "Ulm"], dtype=object), "BYTES")}
def inputs(binary):
    made = []
    for name, (values, kind) in columns.items():
        made.append(triton.InferInput(name, list(values.shape), kind))
        made[-1].set_data_from_numpy(values, binary_data=binary)
    return made
for binary in (True, False):
    for more in ({}, {"request_compression_algorithm": "gzip"}, {"outputs": [triton.InferRequestedOutput("predictions", binary_data=binary), triton.InferRequestedOutput("probabilities", binary_data=binary)]}):
        answer = client.infer("flights", inputs(binary), request_id="seven", **more)
        labels = [v.decode() if isinstance(v, bytes) else v for v in answer.as_numpy("predictions").tolist()]
        told[f"{binary} {sorted(more)}"] = [labels, answer.as_numpy("probabilities").shape, answer.get_response()["id"]]
told["values"] = client.infer("delay", inputs(True)).as_numpy("predictions").round(6).tolist()
try: client.infer("flights", inputs(True)[:2])
except InferenceServerException as e: told["refused"] = str(e)
shared, classes = triton.InferRequestedOutput("predictions"), triton.InferRequestedOutput("predictions", class_count=2)
shared.set_shared_memory("region", 16)
for name, wish in (("shared memory", shared), ("classes", classes)):
    try: client.infer("flights", inputs(True), outputs=[wish])
    except InferenceServerException as e: told[name] = e.status()
print(json.dumps(told))
"""


@pytest.mark.drill
def test_tritons_client(served):
    told = by("clients", TRITON, served)
    assert (told["server"], told["model"], told["index"]) == ("mlops-nb", "flights", ["flights", "delay"])
    answers = [v for k, v in told.items() if k[0] in "TF"]
    assert len(answers) == 6 and all(a == [["on time", "late"], [2, 2], "seven"] for a in answers)
    assert np.allclose(told["values"], [1, 50]) and "'town'" in told["refused"]
    assert (told["shared memory"], told["classes"]) == ("400", "400")      # what is not offered is refused, not answered otherwise


SHAPES = """
import json, sys
import numpy as np, tritonclient.http as triton
client, told = triton.InferenceServerClient(sys.argv[1].removeprefix("http://")), {}
for name in [m["name"] for m in client.get_model_repository_index()]:
    about, inputs = client.get_model_metadata(name), []
    for tensor in about["inputs"]:
        values = {"FP64": np.array([1., 2.], dtype="f4"), "BOOL": np.array([True, False]), "BYTES": np.array(["2020-01-31", "2020-02-01"], dtype=object)}[tensor["datatype"]]
        inputs.append(triton.InferInput(tensor["name"], [2, 1], {"FP64": "FP32"}.get(tensor["datatype"], tensor["datatype"])))
        inputs[-1].set_data_from_numpy(values.reshape(2, 1))
    outputs = client.infer(name, inputs).get_response()["outputs"]
    told[name] = [[[o["name"], o["datatype"], *o["shape"][1:]] for o in outputs], [[o["name"], o["datatype"], *o["shape"][1:]] for o in about["outputs"]]]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    "A server with models unlike each other: labels of text, whole numbers and truth, with and without probabilities; no classes; one column, odd names, a boolean, a time"
    folder, n = tmp_path_factory.mktemp("shapes"), np.arange(60.0)
    number, three = pd.DataFrame({"a": n, "b": n % 7}), np.array(["ä b", "c", "d"])[(n % 3).astype(int)]
    odd = pd.DataFrame({"a b": n, "c.d/e": n % 7, 'größe"': n % 5})
    moment = pd.DataFrame({"when": pd.date_range("2020-01-01", periods=60, freq="7h"), "flag": n % 2 == 1, "a": n})
    prepared = lambda kinds, last: make_pipeline(make_preprocessor(kinds, "linear"), last)
    models = {"texts": (LogisticRegression(), number, three), "whole": (DecisionTreeClassifier(max_depth=2), number, n.astype(int) % 3 * 10), "margin": (LinearSVC(), number, three),
              "ridge": (RidgeClassifier(), number, n > 30), "delay": (LinearRegression(), number[["a"]], n), "strange": (IsolationForest(n_estimators=5), number, None),
              "names": (LogisticRegression(), odd, n > 30), "moment": (prepared({"when": "datetime", "flag": "boolean", "a": "number"}, LogisticRegression()), moment, n > 30)}
    for name, (model, frame, y) in models.items():
        package(model.fit(frame, y), folder / name, name=name, sample=frame)
    with running(*(folder / name for name in models), root=str(folder)) as address:
        yield address


@pytest.mark.drill
def test_metadata_tell_what_is_answered_whatever_the_model(shapes):
    told = by("clients", SHAPES, shapes)
    assert len(told) == 8 and [name for name, (answered, promised) in told.items() if answered != promised] == []
    kinds = {name: [kind for _, kind, *_ in answered] for name, (answered, _) in told.items()}
    assert (kinds["texts"], kinds["margin"], kinds["strange"], kinds["ridge"]) == (["BYTES", "FP64"], ["BYTES"], ["INT64"], ["BOOL"])


def test_bare_values_are_rows_of_a_model_of_one_column(shapes):
    for path, body, key in (("/v1/models/delay:predict", {"instances": [1.0, 2]}, "predictions"), ("/v1/models/delay:predict", {"inputs": {"a": [1.0, 2]}}, "outputs")):
        assert np.allclose(json.loads(ask(shapes, path, body)[2])[key], [1, 2])
    assert np.allclose(json.loads(ask(shapes, "/predictions/delay", [1.0, 2])[2]), [1, 2])


OPEN = """
import json, sys
from open_inference.openapi.client import OpenInferenceClient, InferenceRequest
client = OpenInferenceClient(base_url=sys.argv[1])
client.check_server_liveness(); client.check_server_readiness()
told = {"server": client.read_server_metadata().name, "ready": client.check_model_readiness("flights") is not False, "inputs": [t.name for t in client.read_model_metadata("flights").inputs]}
tensors = [{"name": "temp", "shape": [2], "datatype": "FP64", "data": [1, 50]}, {"name": "wind", "shape": [2], "datatype": "FP64", "data": [1, 2]}, {"name": "town", "shape": [2], "datatype": "BYTES", "data": ["Cork", "Ulm"]}]
answer = client.model_infer("flights", request=InferenceRequest(id="seven", inputs=tensors))
told["answer"] = [answer.id, answer.model_name, [[o.name, o.datatype, o.shape] for o in answer.outputs]]
try: client.model_infer("none", request=InferenceRequest(inputs=tensors))
except Exception as e: told["refused"] = e.status_code
print(json.dumps(told))
"""


@pytest.mark.drill
def test_the_open_inference_client(served):
    told = by("clients", OPEN, served)
    assert told["server"] == "mlops-nb" and told["inputs"] == ["temp", "wind", "town"] and told["refused"] == 404
    assert told["answer"] == ["seven", "flights", [["predictions", "BYTES", [2]], ["probabilities", "FP64", [2, 2]]]]


KSERVE = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
async def main(address):
    told, rows = {}, [{"temp": 1, "wind": 1, "town": "Cork"}, {"temp": 50, "wind": 2, "town": "Ulm"}]
    v1 = InferenceRESTClient(RESTConfig(protocol="v1"))
    told["v1"] = [await v1.infer(address, {"instances": rows}, model_name="flights"), await v1.is_model_ready(address, "flights"), await v1.is_server_live(address), len(await v1.explain(address, "flights", {"instances": rows}))]
    v2 = InferenceRESTClient(RESTConfig(protocol="v2"))
    def tensor(name, kind, values):
        made = InferInput(name=name, shape=[2], datatype=kind)
        made.set_data_from_numpy(values, binary_data=binary)
        return made
    for binary in (True, False):
        tensors = [tensor("temp", "FP64", np.array([1., 50.])), tensor("wind", "FP64", np.array([1., 2.])), tensor("town", "BYTES", np.array(["Cork", "Ulm"], dtype=object))]
        answer = await v2.infer(address, InferRequest(model_name="flights", infer_inputs=tensors, request_id="seven"), model_name="flights")
        told[f"v2 {binary}"] = [answer.id, [v.decode() if isinstance(v, bytes) else str(v) for v in answer.outputs[0].as_numpy().tolist()]]
    told["ready"] = [await v2.is_server_live(address), await v2.is_server_ready(address), await v2.is_model_ready(address, "flights")]
    print(json.dumps(told))
asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.drill
def test_kserves_client(served):
    told = by("kserve", KSERVE, served)
    assert told["v1"] == [{"predictions": ["on time", "late"]}, True, True, 3] and told["ready"] == [True, True, True]
    assert told["v2 True"] == told["v2 False"] == ["seven", ["on time", "late"]]


def test_mlflows_client(served):
    from mlflow.pyfunc.scoring_server.client import ScoringServerClient
    client = ScoringServerClient("127.0.0.1", served.rpartition(":")[2])
    client.wait_server_ready(timeout=180)
    assert client.get_version()
    rows = FRAME.iloc[[1, 50]]
    wanted = json.loads(ask(served, "/v1/models/flights:predict", {"instances": rows.to_dict("records")})[2])["predictions"]
    assert client.invoke(rows).get_predictions().iloc[:, 0].tolist() == wanted
    assert client.invoke(rows.to_numpy()).get_predictions().iloc[:, 0].tolist() == wanted


@pytest.mark.drill
def test_a_fuzzer_finds_no_answer_that_the_document_does_not_tell(served, tmp_path):
    "schemathesis on our document: no 5xx, statuses and bodies as documented"
    done = subprocess.run([Path(sys.executable).parent / "schemathesis", "run", f"{served}/openapi.json", "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
                           "--max-examples", "40", "--seed", "1", "--phases", "examples,coverage,fuzzing", "--workers", "2"], capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]


def protocol_document(columns):
    "The Open Inference Protocol's own OpenAPI document, as MLServer carries it, about one model of ours and its columns"
    import peers
    there = next(Path(peers.python_of("mlserver")).parent.parent.rglob("mlserver/rest/openapi/dataplane.json"))
    document = json.loads(there.read_text())
    document["paths"] = {p.replace("{model_name}", "flights").replace("{model_version}", "1"): operations for p, operations in document["paths"].items() if "docs" not in p and "generate" not in p and "stream" not in p}
    for operations in document["paths"].values():
        for one in [operations, *operations.values()]:
            if isinstance(one, dict) and "parameters" in one:
                one["parameters"] = [p for p in one["parameters"] if p.get("name") not in ("model_name", "model_version")]
    document["components"]["schemas"]["TensorData"] = {"type": "array", "items": {}}       # it says "bytes", which is no type of JSON Schema
    document["components"]["schemas"]["RequestInput"]["properties"]["name"] = {"type": "string", "enum": columns}
    return document


@pytest.mark.drill
def test_a_fuzzer_on_the_protocols_own_document(served, tmp_path):
    "schemathesis on V2's document: whatever it allows to send is answered, or refused as the caller's fault"
    file = tmp_path / "v2.json"
    file.write_text(json.dumps(protocol_document(["temp", "wind", "town"])))
    done = subprocess.run([Path(sys.executable).parent / "schemathesis", "run", file, "--url", served, "--checks", "not_a_server_error,content_type_conformance", "--max-examples", "100", "--seed", "1",
                           "--phases", "examples,coverage,fuzzing"], capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
