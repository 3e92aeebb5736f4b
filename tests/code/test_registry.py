"The registry under failure and under several processes: nothing half done, one winner, one story."
# ruff: noqa: F811
import json
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
import time
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner
from versions import anyroot, bundles, empty_store, made, quietly, root, run, trail  # noqa: F401  (fixtures)

from mlops_nb.audit import events, open_state, reading, verify
from mlops_nb.bundle import MANIFEST, load_bundle, render_manifest
from mlops_nb.cli import app
from mlops_nb.core import MlopsError, digest, state_url
from mlops_nb.monitoring.window import subject_of
from mlops_nb.packaging import package
from mlops_nb.registry import candidates, champion, clean_versions, ensemble, fetch_bundle, promote, reconcile, register, resolve, rollback, served, show, versions
from mlops_nb.registry.lookup import breaks, comparable
from mlops_nb.registry.store import alone, open_registry_state, open_store
from mlops_nb.rollout.guard import Guard, Watch
from mlops_nb.serving.door import Door
from mlops_nb.serving.protocols import Refused


def test_register_is_idempotent_and_what_mlflow_loads_is_what_was_packaged(root, bundles, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setattr("mlflow.utils.requirements_utils._run_command", lambda *_, **__: 1 / 0)         # half a minute in which MLflow would find out what the model needs: the bundle says it
    first = register(bundles[0], root=root, actor="ada", tags={"reviewed": "yes"})
    again = register(bundles[0].path, root=root)
    assert (first.version, first.semver, first.new, first.aliases) == (1, "1.0.0", True, ("champion",))
    assert (again.version, again.new, again.tags["reviewed"], again.tags["data_hash"]) == (1, False, "yes", "hash0")
    assert trail(root) == [("registered", "boarding/1"), ("promoted", "boarding/1")]
    bundle = load_bundle(fetch_bundle("boarding", root=root))
    assert bundle.digest == bundles[0].digest == first.digest
    x = made(tmp_path, "same", 0)[2]
    with open_store(root) as client:
        loaded = mlflow.sklearn.load_model("models:/boarding@champion")
        served_by_mlflow = mlflow.pyfunc.load_model("models:/boarding/1")
        assert served_by_mlflow.metadata.signature.inputs.to_dict()[0] == {"type": "double", "name": "fare", "required": True}
        assert {a.path for a in client.list_artifacts(first.run_id)} == {"bundle"}
        assert [v.version for v in client.search_model_versions("name='boarding' and tag.semver='1.0.0'")] == [1]
    np.testing.assert_allclose(loaded.predict_proba(x), bundle.predict_proba(x), rtol=0, atol=1e-12)    # the compiled form adds in another order
    assert np.array_equal(served_by_mlflow.predict(x), bundle.predict(x))
    assert champion("boarding", root=root).metrics == {"auc": 0.7}
    assert show("boarding", "1.0.0", root=root)["events"][0]["actor"] == "ada"


def test_versions_are_numbered_by_what_changed(root, bundles, tmp_path, monkeypatch):
    history = {"features": {"history": [{"name": "late_1d"}]}}
    steps = [(bundles[0], "1.0.0"), (bundles[1], "1.0.1"), (made(tmp_path, "h", 3, ["late_1d"], **history)[0], "1.1.0"), (made(tmp_path, "m", 4, ["age"])[0], "2.0.0")]
    got = [register(b, root=root, run_id=None) for b, _ in steps]
    assert [v.semver for v in got] == [s for _, s in steps]
    assert got[3].tags["semver_reason"] == "input 'age' is needed, which callers did not have to send"
    assert got[3].tags["parent"] == "3"
    table = versions("boarding", root=root)
    assert list(table.version) == [4, 3, 2, 1] and list(table.aliases) == ["challenger", "", "", "champion"] and list(table.auc) == [0.74, 0.73, 0.71, 0.7]
    promote("boarding", 2, root=root)
    assert rollback("boarding", root=root).version == 1
    promote("boarding", 2, root=root)
    promote("boarding", "2.0.0", root=root)
    with pytest.raises(MlopsError, match="boarding 2 .*callers of version 4 send: input 'age' is refused, which callers send; change the callers, then insist"):
        rollback("boarding", root=root)
    assert served("boarding", root=root)["version"] == 4 and {c["version"]: c["eligible"] for c in candidates("boarding", root=root)} == dict.fromkeys((1, 2, 3, 4), False)
    monkeypatch.chdir(root)
    said = [CliRunner().invoke(app, ["registry", "rollback", "--name", "boarding", *more]) for more in ([], ["--breaking"])]
    assert "'age' is refused" in str(said[0].exception) and "back to version 2" in said[1].output, said[1].output
    assert rollback("boarding", root=root).version == 1
    broken = [e["evidence"].get("breaking", "") for e in events(open_registry_state(root), action="rolled_back")]
    assert [bool(b) for b in broken] == [False, True, False] and "input 'age' is refused" in broken[1]
    with pytest.raises(MlopsError, match="nothing was served before"):
        rollback("boarding", root=root)
    with pytest.raises(MlopsError, match="age.*is needed"):
        rollback("boarding", 4, root=root)
    for breaking in (False, True):
        with pytest.raises(MlopsError, match="never served"):
            rollback("boarding", 3, breaking=breaking, root=root)


def test_the_registry_and_the_door_agree(bundles, tmp_path):
    "What the rule calls compatible is what the server of the new version takes of the old one's callers, and the other way about"
    made_of = {"same": bundles[0], "data": bundles[1], "more": made(tmp_path, "more", 4, ["age"])[0], "other": made(tmp_path, "other", 5, ["weight"])[0], "both": made(tmp_path, "both", 6, ["age", "weight"])[0]}
    for old in made_of.values():
        for new in made_of.values():
            try:
                Door(new.signature["inputs"], new.schema).check([old.input_example])
                taken = True
            except Refused:
                taken = False
            assert taken == (breaks(old, new) == ""), (old.name, new.name)

STEPS = ["MlflowClient.log_artifacts", "MlflowClient.create_logged_model", "mlflow.sklearn.save_model", "MlflowClient.log_model_artifacts", "MlflowClient.finalize_logged_model",
         "MlflowClient.log_metric", "MlflowClient.create_registered_model", "MlflowClient.create_model_version", "append", "set_pointer"]


def test_a_failure_at_any_step_leaves_nothing(root, bundles, monkeypatch):
    import mlflow
    import mlflow.sklearn

    from mlops_nb.registry import changes

    for step, error in [*((s, OSError(28, "No space left on device")) for s in STEPS), *((s, KeyboardInterrupt()) for s in STEPS[3:10:3])]:
        def fail(*args, error=error, **kwargs):
            raise error

        with monkeypatch.context() as m:
            holder = mlflow.MlflowClient if step.startswith("MlflowClient") else mlflow.sklearn if step.startswith("mlflow") else changes
            m.setattr(holder, step.rsplit(".")[-1], fail)
            with pytest.raises(MlopsError if isinstance(error, OSError) else KeyboardInterrupt):
                register(bundles[0], root=root)
        with open_store(root) as client:
            assert not client.search_registered_models(), step
            experiments = [e.experiment_id for e in client.search_experiments()]
            assert not client.search_logged_models(experiment_ids=experiments), step
            assert not client.search_runs(experiments), step
        assert not list((root / ".mlops_nb" / "artifacts").rglob("*.skops")), step
        assert trail(root) == [] and served("boarding", root=root) is None, step
    assert register(bundles[0], root=root).aliases == ("champion",)


def test_what_a_killed_process_left_is_removed_or_finished(root, bundles, monkeypatch):
    import mlflow

    from mlops_nb.registry import changes

    def killed(holder, step):
        def body():
            setattr(holder, step, lambda *a, **k: os._exit(9))
            register(bundles[0], root=root)
        assert run(body) == [9]

    killed(changes, "_enter")
    assert len(versions("boarding", root=root)) == 0 and champion("boarding", root=root) is None
    with pytest.raises(MlopsError, match="no version '1'"):
        resolve("boarding", 1, root=root)
    assert register(bundles[0], root=root).version == 2
    shutil.rmtree(root / ".mlops_nb" / "bundles", ignore_errors=True)

    def second():
        mlflow.MlflowClient.set_model_version_tag = lambda *a, **k: os._exit(9)
        register(bundles[1], root=root)
    assert run(second) == [9]
    assert len(versions("boarding", root=root)) == 1
    done = register(bundles[1], root=root)
    assert (done.version, done.new, done.aliases) == (3, False, ("challenger",))
    assert trail(root) == [("registered", "boarding/2"), ("promoted", "boarding/2"), ("registered", "boarding/3")]


def test_a_copy_of_a_project_leaves_the_files_of_the_first_alone(root, bundles, tmp_path):
    "MLflow holds absolute paths: a clean-up in the copy would remove the bundles of the project it was copied from"
    for bundle in bundles:
        register(bundle, root=root)
    shutil.copytree(root, tmp_path / "copy")
    before = digest(root / ".mlops_nb/artifacts")
    for change in (lambda: clean_versions("boarding", newest=1, days=0, root=tmp_path / "copy"), lambda: register(bundles[0], root=tmp_path / "copy")):
        with pytest.raises(MlopsError, match="copied or moved"):
            change()
    assert [v["removed"] for v in clean_versions("boarding", newest=1, days=0, dry_run=True, root=tmp_path / "copy")] == [False, True, False]
    assert digest(root / ".mlops_nb/artifacts") == before and len(versions("boarding", root=tmp_path / "copy")) == 3
    root.rename(tmp_path / "moved")                          # one that was moved, with a link at its old place
    root.symlink_to(tmp_path / "moved")
    assert [v["removed"] for v in clean_versions("boarding", newest=1, days=0, root=tmp_path / "moved")] == [False, True, False]


def test_a_bundle_that_cannot_be_compared_any_more_and_a_store_that_fails(root, bundles, monkeypatch):
    first, second = (register(b, root=root) for b in bundles[:2])
    with open_store(root) as client:
        assert comparable(client, None, root) is None
        assert comparable(client, first, root).digest == first.digest
        folder = fetch_bundle("boarding", 1, root=root)
        (folder / "card.md").write_text("changed")
        assert comparable(client, first, root) is None
        shutil.rmtree(folder)
        assert comparable(client, first, root) is None
        client.delete_run(second.run_id)
        subprocess.run([sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", f"sqlite:///{root}/.mlops_nb/mlflow.db", "--run-ids", second.run_id], check=True, capture_output=True)
        assert comparable(client, second, root) is None
        with pytest.raises(MlopsError, match="is not in MLflow any more"):
            fetch_bundle("boarding", 2, root=root)
        monkeypatch.setattr(client, "get_run", lambda run_id: (_ for _ in ()).throw(sqlite3.OperationalError("disk I/O error")))
        with pytest.raises(sqlite3.OperationalError):        # nobody may take that for a bundle that is gone
            comparable(client, first, root)


def test_of_two_promotions_at_once_one_wins(anyroot, bundles):
    root = anyroot
    for b in bundles:
        register(b, root=root)
    for _ in range(2):
        now = served("boarding", root=root)["version"]
        others = [v for v in (1, 2, 3) if v != now]
        assert sorted(run(*(quietly(promote, "boarding", v, f"process {v}", expected=now, root=root) for v in others))) == [0, 3]
    moves = [(e["evidence"]["from"], e["evidence"]["to"]) for e in events(open_state(state_url(root)), action="promoted")]
    assert len(moves) == 3 and all(a[1] == b[0] for a, b in pairwise(moves))
    assert verify(open_registry_state(root))["ok"]
    assert served("boarding", root=root)["version"] == moves[-1][1]
    with open_store(root) as client:
        model = client.get_registered_model("boarding")
    assert int(model.aliases["champion"]) == moves[-1][1]
    assert model.tags["audit_head"] == verify(open_registry_state(root))["head"]
    assert reconcile("boarding", root=root) == {}


def test_two_processes_that_register_at_once(anyroot, bundles):
    root = anyroot
    assert run(*(quietly(register, bundles[i], root=root) for i in (0, 1, 1))) == [0, 0, 0]
    table = versions("boarding", root=root)
    assert sorted(table.digest) == sorted(b.digest for b in bundles[:2]) and sorted(table.semver) == ["1.0.0", "1.0.1"]
    assert sorted(a for a, _ in trail(root)) == ["promoted", "registered", "registered"]
    assert verify(open_registry_state(root))["ok"]


def test_an_exchanged_bundle_and_a_malicious_pickle_are_never_loaded(root, bundles, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for b in bundles[:2]:
        register(b, root=root)
    place = fetch_bundle("boarding", 2, root=root)
    shutil.rmtree(place)
    shutil.copytree(bundles[0].path, place)
    with pytest.raises(MlopsError, match="exchanged"):
        promote("boarding", 2, root=root)

    class Evil:
        def __reduce__(self):
            return os.mkdir, ("mark",)

    (place / "model.skops").write_bytes(pickle.dumps(Evil()))
    old = json.loads((place / MANIFEST).read_text())
    old["files"]["model.skops"] = {"size": (place / "model.skops").stat().st_size, "sha256": digest(place / "model.skops")}
    (place / MANIFEST).write_bytes(render_manifest(old))
    for call in (lambda: fetch_bundle("boarding", 2, root=root), lambda: promote("boarding", 2, root=root), lambda: load_bundle(place).model):
        with pytest.raises(MlopsError):
            call()
    shutil.rmtree(place)
    with pytest.raises(MlopsError, match="no such bundle"):
        promote("boarding", 2, root=root)
    assert champion("boarding", root=root).version == 1
    assert not (tmp_path / "mark").exists()


def test_a_registry_that_is_down_locked_or_damaged_says_so_in_one_line_and_changes_nothing(root, bundles, monkeypatch):
    register(bundles[0], root=root)
    before = trail(root)
    db = root / ".mlops_nb" / "mlflow.db"
    pauses, sleep = [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: pauses.append(seconds) or sleep(seconds))

    def told(match, *calls):
        for call in calls:
            pauses.clear()
            with pytest.raises(MlopsError, match=match) as e:
                call()
            assert "\n" not in str(e.value) and len(str(e.value)) < 500 and sum(pauses) < 10       # MLflow by itself would try again for minutes
            assert "secret" not in str(e.value)
        assert trail(root) == before and served("boarding", root=root)["version"] == 1

    lock = sqlite3.connect(db, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    told("locked", lambda: register(bundles[1], root=root))
    lock.execute("ROLLBACK")
    lock.close()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://ada:secret@127.0.0.1:1/mlflow")
    told("model registry postgresql", lambda: versions("boarding", root=root), lambda: register(bundles[1], root=root), lambda: promote("boarding", 1, expected=9, root=root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    good = db.read_bytes()
    db.write_bytes(b"damaged" * 1000)
    told("restore a backup", lambda: versions("boarding", root=root), lambda: register(bundles[1], root=root), lambda: fetch_bundle("boarding", root=root))
    db.write_bytes(good)
    assert register(bundles[1], root=root).version == 2


def test_a_pointer_that_was_moved_by_hand_is_found(root, bundles):
    "No event explains it: `audit verify` says so"
    register(bundles[0], root=root)
    register(bundles[1], root=root)
    verify = lambda: subprocess.run([sys.executable, "-c", "from mlops_nb.cli import main; main()", "audit", "verify", "--json"], cwd=root, capture_output=True, text=True)
    assert verify().returncode == 0
    with sqlite3.connect(root / ".mlops_nb/state.db") as db:
        db.execute("UPDATE served SET version = 2")
    done = verify()
    assert done.returncode == 2 and "version 2 is served, and the trail says version 1" in json.loads(done.stdout)["reason"], done.stderr


def test_a_database_that_goes_down_in_a_change_is_an_error_in_one_line(postgres):
    engine = open_state(postgres.new_database())
    with pytest.raises(MlopsError, match="state database postgresql.*terminating connection"), alone(engine, "boarding"):
        with reading(engine) as connection:
            connection.exec_driver_sql("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND pid <> pg_backend_pid()")


def test_a_registry_that_was_lost_is_not_an_empty_one(root, bundles):
    assert versions("boarding", root=root).empty
    register(bundles[0], root=root)
    (root / ".mlops_nb" / "mlflow.db").unlink()
    for ask in (versions, show, champion):
        with pytest.raises(MlopsError, match="version 1 is served, but MLflow's registry knows no version: restore a backup"):
            ask("boarding", root=root)


def test_what_an_ensemble_is_held_against(tmp_path):
    x = pd.DataFrame({"wind": np.random.default_rng(0).gamma(3, 4, 200)})
    for above, accuracy in ((9, .9), (12, .8)):
        register(package(LogisticRegression().fit(x, x.wind > above), tmp_path / f"b{above}", name="late", sample=x, metadata={"metrics": {"accuracy": accuracy}}), root=tmp_path)
    both = ensemble("late", [1, 2], rows=x, root=tmp_path)
    watch = Watch(SimpleNamespace(model="late", root=tmp_path), Guard())
    assert [watch.promised(str(v)) for v in (1, 2, both.version)] == [.9, .8, .8]
    assert subject_of("late", version=both.version, root=tmp_path).metrics == {"accuracy": {"value": .8}}
