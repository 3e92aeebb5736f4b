"Small bundles and projects with registered versions: what the tests of the registry and of governance share."
import multiprocessing
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline

from mlops_nb.audit import events, open_state
from mlops_nb.core import MlopsError, state_url
from mlops_nb.features import make_preprocessor, model_input
from mlops_nb.packaging import package
from mlops_nb.registry.store import open_store

FORK = multiprocessing.get_context("fork")


def made(folder, name, seed=0, more=(), **metadata):
    "A bundle of a small model with a number, a category and a time"
    rng = np.random.default_rng(seed)
    kinds = {"fare": "number", "town": "category", "sold": "datetime", **{c: "number" for c in more}}
    raw = pd.DataFrame({"fare": rng.normal(size=60), "town": rng.choice(["Ulm", "Cork", None], 60), "sold": pd.Timestamp("2012-04-01"), **{c: rng.normal(size=60) for c in more}})
    x = model_input(raw, kinds)
    model = Pipeline([("prepare", make_preprocessor(kinds, "linear")), ("model", LogisticRegression())]).fit(x, raw.fare + rng.normal(0, 0.3, 60) > 0)
    return package(model, folder / name, name="boarding", sample=x, metadata={"metrics": {"auc": {"value": 0.7 + seed / 100}}, "training": {"data": f"hash{seed}"}, **metadata}), model, x


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    "Three bundles of one recipe"
    folder = tmp_path_factory.mktemp("bundles")
    return [made(folder, f"b{i}", i)[0] for i in range(3)]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    "An MLflow store with nothing in it: setting one up takes seconds"
    root = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as m:
        m.delenv("MLFLOW_TRACKING_URI", raising=False)
        with open_store(root, create=True):
            pass
    return root / ".mlops_nb" / "mlflow.db"


@pytest.fixture
def root(tmp_path, empty_store, monkeypatch):
    "A project in a path with a space; its state is in PostgreSQL when one is offered"
    for name in ("MLFLOW_TRACKING_URI", "MLOPS_NB_STATE_URL"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "my project"
    (folder / ".mlops_nb").mkdir(parents=True)
    shutil.copy(empty_store, folder / ".mlops_nb" / "mlflow.db")
    return folder


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.drill)])
def anyroot(request, root, monkeypatch):
    "The same, with the state in SQLite and, as a drill, in PostgreSQL"
    if request.param == "postgresql":
        monkeypatch.setenv("MLOPS_NB_STATE_URL", request.getfixturevalue("postgres").new_database())
    return root


def trail(root):
    return [(e["action"], e["subject"]) for e in events(open_state(state_url(root)))]


def run(*targets):
    "Run functions in processes of their own, all started at once; their exit codes"
    start = FORK.Barrier(len(targets))

    def body(target):
        start.wait()
        target()

    workers = [FORK.Process(target=body, args=(t,)) for t in targets]
    for w in workers:
        w.start()
    for w in workers:
        w.join(600)
    return [w.exitcode for w in workers]


def quietly(action, *args, **kwargs):
    "A process body that ends with 3 when it is told no"
    def body():
        try:
            action(*args, **kwargs)
        except MlopsError:
            os._exit(3)
    return body
