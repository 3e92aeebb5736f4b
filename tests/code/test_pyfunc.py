"Models of other makes in a bundle: loaded only where they are trusted, answered as by themselves, served over all protocols, handed back."
import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from load import ask
from servers import free_port
from waiting import until

from mlops_nb.bundle import MANIFEST, load_bundle, render_manifest, to_tar
from mlops_nb.core import MlopsError, digest
from mlops_nb.packaging import package
from mlops_nb.registry import ensemble, export_version, fetch_bundle, register
from mlops_nb.rollout.envoy import Gateway
from mlops_nb.serving.models import load_served

PROGRAM = os.path.join(os.path.dirname(sys.executable), "mlops-nb")
MARK = "mark-of-the-pickle"
FRAME = pd.DataFrame({"fare": np.arange(40, dtype="float32"), "stops": np.arange(40) % 3, "town": ["Cork", "Brest"] * 20})


class Evil:
    def __reduce__(self):
        return os.mkdir, (MARK,)


def make_model():
    "A model whose class goes into its pickle, since it is of no module"
    class Boarding(mlflow.pyfunc.PythonModel):
        def predict(self, context, model_input, params=None):
            if model_input.stops.dtype != "int64" or model_input.fare.dtype != "float32":
                raise RuntimeError(f"types of the sample are wanted: {model_input.dtypes}")
            late = np.clip(model_input.fare / 100 + (model_input.town == "Cork") * 0.5, 0, 1)
            return pd.DataFrame({"late": late, "on time": 1 - late})
    return Boarding()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A bundle and the MLflow model it was made from"
    folder = tmp_path_factory.mktemp("pyfunc")
    mlflow.pyfunc.save_model(str(folder / "model"), python_model=make_model(), pip_requirements=["mlflow", "pandas"])
    bundle = package(folder / "model", folder / "bundle", name="boarding", sample=FRAME, metadata={"metrics": {"auc": 0.7}}, trust=True)
    return bundle, folder / "model"


def reseal(folder):
    "Write a manifest that is sound for what is in the folder now"
    files = {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": digest(p)} for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST}
    (folder / MANIFEST).write_bytes(render_manifest({**json.loads((folder / MANIFEST).read_text()), "files": files}))


@pytest.fixture
def evil(made, tmp_path, monkeypatch):
    "The same bundle with a pickle that leaves a mark, its hashes right"
    monkeypatch.chdir(tmp_path)
    bundle = shutil.copytree(made[0].path, tmp_path / "evil")
    for file in (bundle / "mlflow").rglob("*.pkl"):
        file.write_bytes(pickle.dumps(Evil()))
    reseal(bundle)
    return bundle


def test_it_answers_as_the_model_does(made, tmp_path):
    bundle, model = made
    want = mlflow.pyfunc.load_model(str(model)).predict(FRAME)
    for opened in (bundle, load_bundle(to_tar(bundle, tmp_path / "b.tar"), trust=True)):
        assert np.allclose(opened.predict_proba(FRAME), want)
        assert opened.predict(FRAME).tolist() == want.idxmax(axis=1).tolist()
        spelled = json.loads(FRAME.to_json(orient="records"))
        assert np.allclose(opened.predict_proba([{**r, "fare": int(r["fare"]), "stops": float(r["stops"])} for r in spelled]), want)
    assert (bundle.manifest["form"], bundle.manifest["classes"], bundle.compiled) == ("mlflow", ["late", "on time"], False)
    with pytest.raises(MlopsError, match="'stops'"):
        bundle.predict({"fare": 1, "stops": None, "town": "Cork"})
    again = package(model, tmp_path / "again", name="boarding", sample=FRAME, metadata={"metrics": {"auc": 0.7}}, trust=True)
    assert again.digest == bundle.digest


def test_a_pickle_leaves_no_mark_without_trust(evil, tmp_path, monkeypatch):
    monkeypatch.setenv("MLOPS_NB_TRUST", "0")
    bundle = load_bundle(evil)
    assert bundle.signature and bundle.schema and bundle.input_example
    for call in (lambda: bundle.model, lambda: bundle.predict(FRAME), lambda: load_served(evil), lambda: package(evil / "mlflow", "x", name="x", sample=FRAME)):
        with pytest.raises(MlopsError, match="--trust|trust=True") as e:
            call()
        assert len(str(e.value).splitlines()) == 2
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    project = tmp_path / "project"
    project.mkdir()
    register(evil, root=project)
    assert load_bundle(fetch_bundle("boarding", root=project)).digest == bundle.digest
    export_version("boarding", 1, "mlflow", root=project)
    done = subprocess.run([PROGRAM, "serve", "--model", str(evil), "--port", "0", "--no-log"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "--trust" in done.stderr + done.stdout and "Traceback" not in done.stderr
    assert not os.path.exists(MARK)


def test_a_flipped_byte_is_found_before_anything_is_loaded(evil):
    for file in sorted(p for p in evil.rglob("*") if p.is_file()):
        good = file.read_bytes()
        for i in range(0, len(good), max(1, len(good) // 20)):
            file.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1:])
            with pytest.raises(MlopsError, match=file.name):
                load_bundle(evil, trust=True)
        file.write_bytes(good)
    opened = load_bundle(evil, trust=True)                   # changed after it was opened
    (evil / "mlflow" / "MLmodel").write_text("flavors: {}")
    with pytest.raises(MlopsError, match="MLmodel: not what the manifest says"):
        _ = opened.model
    assert not os.path.exists(MARK)


def test_the_mark_would_be_left_with_trust(evil, monkeypatch):
    monkeypatch.setenv("MLOPS_NB_TRUST", "1")
    with pytest.raises(MlopsError):
        load_bundle(evil).predict(FRAME)
    assert os.path.exists(MARK)


def test_a_killed_process_leaves_its_copy_to_the_next(made, tmp_path, monkeypatch):
    from mlops_nb.bundle import pyfunc
    program = f"import sys; from mlops_nb.bundle import load_bundle; model = load_bundle({str(made[0].path)!r}, trust=True).model; print('loaded', flush=True); sys.stdin.read()"
    start = lambda: subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)})
    copies = lambda: {p.name for p in tmp_path.glob("mlops_nb-mlflow-*")}
    lives = start()
    assert lives.stdout.readline() == b"loaded\n"
    (kept,) = copies()
    assert (tmp_path / kept).stat().st_mode & 0o77 == 0
    killed = start()
    assert killed.stdout.readline() == b"loaded\n"
    killed.kill()
    killed.wait()
    (left,) = copies() - {kept}
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    load_bundle(made[0].path, trust=True).predict(FRAME)
    assert copies() >= {kept, left}                          # it is not old enough
    monkeypatch.setattr(pyfunc, "_YOUNG", -1)
    load_bundle(made[0].path, trust=True).predict(FRAME)
    assert kept in copies() and left not in copies()
    lives.communicate(b"")
    assert not lives.returncode and kept not in copies()


@contextlib.contextmanager
def by_command(bundle, folder):
    "The address of a server that the command started"
    port = free_port()
    process = subprocess.Popen([PROGRAM, "serve", "--model", str(bundle), "--trust", "--port", str(port), "--no-log"], cwd=folder)
    try:
        def ready():
            assert process.poll() is None
            with contextlib.suppress(OSError):
                return ask(f"http://127.0.0.1:{port}", "/ready")[0] == 200
        until(ready)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        assert process.wait(180) == 0


def test_it_is_served_over_all_protocols(made, tmp_path):
    bundle, _ = made
    rows = json.loads(FRAME.head(3).to_json(orient="records"))
    want, p = bundle.predict(rows).tolist(), bundle.predict_proba(rows)
    with by_command(bundle.path, tmp_path) as address:
        def told(path, body):
            status, _, text = ask(address, path, body, seconds=60)
            assert status == 200, text
            return json.loads(text)
        assert told("/v1/models/boarding:predict", {"instances": rows})["predictions"] == want
        assert told("/invocations", {"dataframe_records": rows})["predictions"] == want
        assert told("/predictions/boarding", rows) == want
        own = told("/predict", {"rows": rows})
        assert own["predictions"] == want and np.allclose(own["scores"], p[:, 1], atol=1e-6)
        columns = [("fare", "FP64"), ("stops", "INT64"), ("town", "BYTES")]
        v2 = told("/v2/models/boarding/infer", {"inputs": [{"name": c, "shape": [3], "datatype": t, "data": [r[c] for r in rows]} for c, t in columns]})
        assert {o["name"]: o["data"] for o in v2["outputs"]}["predictions"] == want
        status, _, text = ask(address, "/predict", {"rows": [*rows, {**rows[0], "stops": 0.5}]})
        assert status == 400 and b"'stops'" in text and json.loads(text)["row"] == 3
        answers = {}
        def one(i):
            answers[i] = told("/predict", {"rows": [rows[i % 3]]})["predictions"]
        threads = [threading.Thread(target=one, args=(i,)) for i in range(30)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert answers == {i: [want[i % 3]] for i in range(30)}


def test_it_goes_out_as_the_directory_that_came_in(made, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    bundle, model = made
    assert register(bundle, root=tmp_path).tags["algorithm"] == "mlflow.pyfunc"
    out = export_version("boarding", 1, "mlflow", root=tmp_path)
    ours = {"model-settings.json", "export.json"}
    files = lambda folder: {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in ours}
    assert files(out) == files(model)
    assert np.allclose(mlflow.pyfunc.load_model(str(out)).predict(FRAME), bundle.predict_proba(FRAME))
    for other in ("onnx", "bentoml", "kserve", "docker"):
        with pytest.raises(MlopsError, match="--format mlflow"):
            export_version("boarding", 1, other, root=tmp_path)
    package(model, tmp_path / "less", name="boarding", sample=FRAME.head(30), trust=True)
    assert register(tmp_path / "less", root=tmp_path).version == 2
    with pytest.raises(MlopsError, match="part of another"):
        ensemble("boarding", [1, 2], root=tmp_path)
    from mlops_nb.registry.store import open_store
    with open_store(tmp_path):
        assert np.allclose(mlflow.pyfunc.load_model("models:/boarding/1").predict(FRAME), bundle.predict_proba(FRAME))


def test_the_answers_of_a_file(made, tmp_path):
    FRAME.to_csv(tmp_path / "rows.csv", index=False)
    command = [PROGRAM, "predict", "rows.csv", "--model", str(made[0].path)]
    run = lambda *more: subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    done = run("--trust", "--out", "answers.csv")
    assert done.returncode == 0, done.stderr
    assert pd.read_csv(tmp_path / "answers.csv").prediction.tolist() == made[0].predict(FRAME).tolist()
    refused = run()
    assert refused.returncode == 1 and "--trust" in refused.stderr + refused.stdout and "Traceback" not in refused.stderr


def registered(made, folder, monkeypatch):
    "A project with two versions"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (folder / "params.yaml").write_text("base: {name: boarding}\n")
    register(made[0], root=folder)
    package(made[1], folder / "second", name="boarding", sample=FRAME.head(30), trust=True)
    assert register(folder / "second", root=folder).version == 2


def test_a_platform_says_at_once_that_it_needs_trust(made, tmp_path, monkeypatch):
    from mlops_nb.rollout.platform import up
    registered(made, tmp_path, monkeypatch)
    with pytest.raises(MlopsError, match="version 1: it is an MLflow model .*up --trust"):
        up(tmp_path, gateway=Gateway(port=0))
    assert not (tmp_path / ".mlops_nb/platform/supervisor.pid").exists()


@pytest.mark.drill
def test_a_platform_with_trust_serves_it_and_rolls_it_out(made, tmp_path, monkeypatch):
    from mlops_nb.rollout import Rollout
    from mlops_nb.rollout.platform import down, status, up
    registered(made, tmp_path, monkeypatch)
    rows = json.loads(FRAME.head(3).to_json(orient="records"))
    try:
        address = up(tmp_path, gateway=Gateway(port=0), trust=True, seconds=300)["gateway"]
        assert json.loads(ask(address, "/predict", {"rows": rows}, seconds=60)[2])["predictions"] == made[0].predict(rows).tolist()
        rollout = Rollout(tmp_path)
        rollout.start(2, rollout.at_once())
        assert rollout.run().state == "done"
        assert status(tmp_path)["weights"] == {"2": 100} and status(tmp_path)["champion"] == "2"
    finally:
        down(tmp_path)


TORCH = """
import json, pathlib, sys
import mlflow, numpy as np, pandas as pd, torch
from load import ask
from mlops_nb.bundle import load_bundle
from mlops_nb.packaging import package
from mlops_nb.serving.server import running
here = pathlib.Path(sys.argv[1])
torch.manual_seed(0)
frame = pd.DataFrame(np.random.default_rng(0).normal(size=(200, 4)), columns=list("abcd")).astype("float32")
tensor = torch.from_numpy(frame.to_numpy(copy=True))
nets = {"classes": torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3), torch.nn.Softmax(dim=1)),
        "chance": torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Sigmoid()), "value": torch.nn.Linear(4, 1)}
given = {"classes": ["early", "in time", "late"], "chance": [False, True]}
told, rows = {}, json.loads(frame.head(5).to_json(orient="records"))
for name, net in nets.items():
    # MLflow's two ways: a traced graph, a pickle
    stored = {"input_example": frame.to_numpy()[:2]} if name == "classes" else {"serialization_format": "pickle"}
    mlflow.pytorch.save_model(net.eval(), str(here / name), pip_requirements=["torch"], **stored)
    package(here / name, here / f"{name}-bundle", name=name, sample=frame, metadata={"classes": given[name]} if name in given else {}, trust=True)
    bundle, out = load_bundle(here / f"{name}-bundle", trust=True), net(tensor).detach().numpy()
    mine = bundle.predict(frame)[:, None] if name == "value" else bundle.predict_proba(frame)[:, -out.shape[1]:]
    told[name] = [bundle.manifest["task"], bundle.manifest["algorithm"], float(abs(mine - out).max())]
with running(*(here / f"{n}-bundle" for n in nets), root=str(here), trust=True, log=False, seconds=120) as address:
    for name in nets:
        answer = json.loads(ask(address, f"/v1/models/{name}:predict", {"instances": rows}, seconds=60)[2])["predictions"]
        want = load_bundle(here / f"{name}-bundle", trust=True).predict(frame.head(5)).tolist()
        told[name].append(bool(np.allclose(answer, want, atol=1e-5)) if name == "value" else answer == want)
print(json.dumps(told))
"""


@pytest.mark.drill
def test_a_pytorch_model(tmp_path, root):
    import peers
    try:
        python = peers.python_of("torch")
    except subprocess.CalledProcessError:
        pytest.skip("no PyTorch for processors alone is to be had from the configured index")
    done = subprocess.run([python, "-c", TORCH, tmp_path], capture_output=True, text=True, timeout=600,
                          env={**os.environ, "PYTHONPATH": f"{root}:{Path(__file__).parent.parent}", "MLFLOW_DISABLE_TELEMETRY": "true"})
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert {k: v[0] for k, v in told.items()} == {"classes": "multiclass", "chance": "binary", "value": "regression"}
    assert all(v[1] == "mlflow.pytorch" and v[2] < 1e-5 and v[3] for v in told.values()), told
