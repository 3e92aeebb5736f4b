"What DVC makes of the pipeline: only what depends on a change runs, data come back with an old commit, two runs from nothing agree."
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent / "model"))
import project  # noqa: E402

from mlops_nb.audit import append, open_state, verify  # noqa: E402
from mlops_nb.core import MlopsError, digest, state_url  # noqa: E402
from mlops_nb.jobs import run_job  # noqa: E402
from mlops_nb.pipeline.layout import STAGES  # noqa: E402
from mlops_nb.pipeline.retrain import planned, retrain, set_params  # noqa: E402
from mlops_nb.registry import versions  # noqa: E402

pytestmark = pytest.mark.xdist_group("dvc")
OUTPUTS = ["data/features", "artifacts/model", "artifacts/evaluation", "artifacts/baseline", "artifacts/bundle", "reports"]


def sh(*command, cwd, ok=True, **env):
    "Run a command of the environment; its output"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=cwd, env={**os.environ, "PATH": path, **env}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


def table(seed=0):
    "A table that a linear model can learn"
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(600, 3))
    return pd.DataFrame(x, columns=list("abc")).assign(shop=rng.choice(["n", "s"], 600), sold=x[:, 0] + rng.normal(size=600) / 2 > 0)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A project in git, in a path with a space, run once by DVC"
    folder = tmp_path_factory.mktemp("with git") / "my project"
    folder.mkdir()
    sh("git", "init", "-q", cwd=folder)
    sh("git", "config", "user.email", "test@example.org", cwd=folder)
    sh("git", "config", "user.name", "Test", cwd=folder)
    project.make(folder, table(), "sold")
    sh("dvc", "repro", cwd=folder)
    sh("git", "add", "-A", cwd=folder)
    sh("git", "commit", "-qm", "first", cwd=folder)
    return folder


def test_nothing_to_do_the_second_time_and_the_tree_is_clean(done):
    assert "up to date" in sh("dvc", "repro", cwd=done)
    assert sh("git", "status", "--porcelain", cwd=done) == ""


def test_the_graph_is_the_way_of_the_data(done):
    graph = sh("dvc", "dag", "--dot", cwd=done)
    for before, after in zip(STAGES[:3], STAGES[1:4]):
        assert f'"{before}" -> "{after}"' in graph
    assert '"package" -> "register"' in graph


CHANGES = {
    "ingest.time": ("a", {"ingest"}),
    "validate.schema": ("data/schema2.yaml", {"validate", "featurize", "package"}),
    "features.history": ([{"name": "h", "value": "a", "known": "b"}], {"featurize", "package"}),
    "train.search.n_trials": (3, {"train"}),
    "evaluate.slices": ([], {"evaluate"}),
    "gate.better_than_dummy": (False, {"evaluate"}),
    "register.margin": (0.5, {"register"}),
    "base.positive": (False, {"train"}),
    "base.seed": (1, {"train", "evaluate", "register"}),
    "base.name": ("other", {"train", "package", "register"}),
}


@pytest.mark.parametrize("leaf", CHANGES)
def test_a_changed_parameter_touches_only_the_stages_that_declare_it(done, leaf):
    from dvc.repo import Repo

    value, stages = CHANGES[leaf]
    path = done / "params.yaml"
    before = path.read_text()
    params = yaml.safe_load(before)
    inner = params
    *parents, last = leaf.split(".")
    for key in parents:
        inner = inner[key]
    inner[last] = value
    try:
        path.write_text(yaml.safe_dump(params))
        with Repo(str(done)) as repo:
            assert {name.rpartition(":")[2] for name in repo.status()} == stages
    finally:
        path.write_text(before)


def test_a_retraining_says_what_it_would_run(done):
    assert planned(done) == []
    before = (done / "params.yaml").read_text()
    try:
        set_params(done / "params.yaml", {"train.search.n_trials": 3})
        assert planned(done) == ["train"]
    finally:
        (done / "params.yaml").write_text(before)
    assert planned(done, {"train.search.n_trials": 3, "evaluate.bootstrap": 50}) == ["train", "evaluate"]
    assert (done / "params.yaml").read_text() == before
    with pytest.raises(MlopsError, match="^params.yaml: unknown key .*did you mean 'n_trials'"):
        planned(done, {"train.search.n_trails": 3})


def test_the_job_is_run_again_when_there_are_new_data(done, tmp_path):
    "Keyed by its parameters alone, a run without a window would be done for ever"
    shutil.copytree(done, work := tmp_path / "work")
    run = lambda: run_job("retrain", root=work, tell=lambda text: None)
    first, again = run(), run()
    assert (first["new"], again["new"], again["key"]) == (True, False, first["key"])
    table = next((work / "data/source").iterdir())
    shutil.copy(table, table.with_name(f"more{table.suffix}"))
    more = run()
    assert more["new"] and more["key"] != first["key"] and not run()["new"]


@pytest.mark.drill
def test_a_retraining_registers_or_gives_its_reasons(done, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(done, work)
    assert retrain(work)["decision"] == "nothing"
    better = retrain(work, {"base.seed": 7, "register.margin": 1.0})
    assert better["decision"] == "registered" and better["version"].endswith("/2") and better["stages"][-1] == "register"
    again = retrain(work, {"base.seed": 7, "register.margin": 1.0})      # as after a kill between the registration and the rollout
    assert (again["decision"], again["version"], again["reasons"]) == ("registered", better["version"], ["it was registered before, and never rolled out"])
    append(open_state(state_url(work)), actor="test", action="rollout pending", subject=better["version"])
    assert retrain(work, {"base.seed": 7, "register.margin": 1.0})["reasons"] == ["this model was registered before"]
    refused = retrain(work, {"gate.metrics": {"roc_auc": {"min": 0.9999}}})
    assert refused["decision"] == "refused" and "roc_auc" in refused["reasons"][0]


@pytest.mark.drill
@pytest.mark.parametrize("whom", ["it alone", "all of it"])
def test_a_retraining_that_is_killed_is_finished_by_the_next(done, tmp_path, whom):
    "SIGKILL after each stage that has left something: to the process, whose DVC goes on for a while, or to its children as well"
    work, changes = tmp_path / "work", {"base.seed": 7, "register.margin": 1.0}
    shutil.copytree(done, work)
    program = f"from mlops_nb.pipeline.retrain import retrain; retrain('.', {changes!r})"
    for left in ("params.yaml", "artifacts/model/model.skops", "artifacts/baseline", "artifacts/bundle"):
        process = subprocess.Popen([sys.executable, "-c", program], cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        end = time.monotonic() + 180
        while not list((work / ".mlops_nb/retrain").glob(f"[!.]*/{left}")) and process.poll() is None:
            assert time.monotonic() < end, left
            time.sleep(0.02)
        if whom == "it alone":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(180)
    last = retrain(work, changes)
    assert (last["decision"], last["version"][-2:]) == ("registered", "/2")
    assert sorted(versions(last["version"].partition("/")[0], root=work).version) == [1, 2] and verify(open_state(state_url(work)))["ok"]
    assert os.listdir(work / ".mlops_nb/retrain") == ["lock"] and sh("git", "status", "--porcelain", cwd=work) == ""


@pytest.mark.drill
def test_two_runs_from_nothing_give_the_same_bytes(done, tmp_path):
    other = tmp_path / "again"
    sh("git", "clone", "-q", str(done), str(other), cwd=tmp_path)
    shutil.copytree(done / "data/source", other / "data/source")
    sh("dvc", "repro", cwd=other)
    for name in OUTPUTS:
        assert digest(other / name) == digest(done / name), name
    assert sh("git", "status", "--porcelain", cwd=other) == ""


@pytest.mark.drill
def test_an_earlier_commit_brings_its_data_and_model_back(done, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(done, work, ignore=shutil.ignore_patterns(".mlops_nb"))      # a copy gets a registry of its own
    sh("dvc", "remote", "add", "-d", "store", str(tmp_path / "remote"), cwd=work)
    sh("git", "commit", "-qam", "remote", cwd=work)
    sh("dvc", "push", "-q", cwd=work)
    first = digest(work / "artifacts/bundle")
    params = (work / "params.yaml").read_text()
    (work / "params.yaml").write_text(re.sub(r"margin: \S+", "margin: 0.5", params))
    table(1).to_parquet(work / "data/source/my project.parquet")
    sh("dvc", "repro", cwd=work)
    sh("git", "commit", "-qam", "second", cwd=work)
    sh("dvc", "push", "-q", cwd=work)
    assert digest(work / "artifacts/bundle") != first
    assert "metrics.json" in sh("dvc", "metrics", "diff", "HEAD~1", cwd=work)

    clone = tmp_path / "clone"
    sh("git", "clone", "-q", str(work), str(clone), cwd=tmp_path)
    sh("git", "checkout", "-q", "HEAD~1", cwd=clone)
    sh("dvc", "pull", "-q", "artifacts/bundle", "data/raw", cwd=clone, ok=True)
    assert digest(clone / "artifacts/bundle") == first


@pytest.mark.drill
def test_an_experiment_with_another_parameter(done, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(done, work, ignore=shutil.ignore_patterns(".mlops_nb"))      # a copy gets a registry of its own
    sh("dvc", "exp", "run", "-S", "train.search.n_trials=3", "-S", "register.margin=1", cwd=work)
    assert "n_trials" in sh("dvc", "exp", "show", "--csv", cwd=work)


@pytest.mark.drill
def test_a_project_without_git(tmp_path):
    folder = project.make(tmp_path / "no git", table(), "sold")
    sh("dvc", "repro", cwd=folder)
    assert "no git/1" in sh("mlops-nb", "summary", cwd=folder) or "no-git/1" in sh("mlops-nb", "summary", cwd=folder)
