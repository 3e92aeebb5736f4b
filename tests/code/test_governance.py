"Approval under several processes and on two databases, a signed bundle flipped byte by byte, an export behind MLflow's own server, the audit commands' speed in what they import."
# ruff: noqa: F811
import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from servers import free_port
from versions import anyroot, bundles, empty_store, made, quietly, root, run, trail  # noqa: F401  (fixtures)
from waiting import until

from mlops_nb.audit import append, events, open_state, transaction, verify, whoami
from mlops_nb.bundle import load_bundle, to_tar
from mlops_nb.core import MlopsError, Refusal, state_url
from mlops_nb.governance import backup_state, restore_state
from mlops_nb.registry import approve, champion, export_version, fetch_bundle, promote, register, rollback, served
from mlops_nb.registry import request as request_review
from mlops_nb.registry.store import open_store
from mlops_nb.rollout.ports import Routes
from mlops_nb.rollout.run import RegistryPointer, Rollout

ROOT = Path(__file__).resolve().parent.parent.parent


def acting(name, action, *args, **kwargs):
    def body():
        os.environ["MLOPS_NB_ACTOR"] = name
        return action(*args, **kwargs)
    return body


def test_two_people_decide_at_once_and_an_approval_is_used_once(anyroot, bundles, monkeypatch):
    root = anyroot
    (root / "params.yaml").write_text("approval: {needed: 2, approvers: [ada, bob, cyd]}")
    monkeypatch.setenv("MLOPS_NB_ACTOR", "mona")
    for b in bundles[:2]:
        register(b, root=root)
    assert served("boarding", root=root) is None
    for v in (1, 2):
        request_review("boarding", v, root=root)
    with pytest.raises(Refusal, match="approved by nobody; 2 needed"):
        promote("boarding", 1, root=root)
    for who in ("ada", "bob"):
        acting(who, approve, "boarding", 2, root=root)()
    monkeypatch.setenv("MLOPS_NB_ACTOR", "mona")
    assert sorted(run(*(quietly(acting(who, approve, "boarding", 1, root=root)) for who in ("ada", "bob", "ada")))) == [0, 0, 3]
    assert sorted(run(*(quietly(promote, "boarding", v, root=root) for v in (1, 1, 2)))) in ([0, 3, 3], [0, 0, 3])
    if served("boarding", root=root)["trail"] == [1]:
        promote("boarding", 2, root=root)
    told = events(open_state(state_url(root)), action="promoted")
    assert [{d["actor"] for d in e["evidence"]["approval"]["by"]} for e in told] == [{"ada", "bob"}] * len(told)
    assert len({e["evidence"]["to"] for e in told}) == len(told)
    if len(told) == 2:
        rollback("boarding", root=root)
        with pytest.raises(Refusal, match="used up"):
            promote("boarding", told[-1]["evidence"]["to"], root=root)
    assert verify(open_state(state_url(root)))["ok"]


def test_the_rollout_engine_cannot_promote_what_nobody_approved(root, bundles, monkeypatch):
    monkeypatch.setenv("MLOPS_NB_ACTOR", "ada")
    for b in bundles[:2]:
        register(b, root=root)
    (root / "params.yaml").write_text("approval: {approvers: [bob]}")
    port = RegistryPointer("boarding", root)
    with pytest.raises(Refusal, match="nobody asked for its approval"):
        port.point("2", "1", "rollout", "canary")
    assert (port.pointed(), trail(root)[-1]) == ("1", ("registered", "boarding/2"))
    request_review("boarding", 2, root=root)
    monkeypatch.setenv("MLOPS_NB_ACTOR", "bob")
    approve("boarding", 2, root=root)
    port.point("2", "1", "rollout", "canary")
    assert champion("boarding", root=root).version == 2


def test_a_version_that_would_refuse_its_callers_is_not_rolled_out_unsaid(root, bundles, tmp_path):
    "They would all be answered with 400, which is no fault of the service: the gate would not see it"
    for b in (bundles[0], bundles[1], made(tmp_path, "more", 4, ["age"])[0]):
        register(b, root=root)
    weights = {"1": 100}
    target = SimpleNamespace(routed=lambda: Routes(weights), revisions=lambda: [], size=lambda r: 1)
    rollout = Rollout(root, "boarding", (target, None))
    with pytest.raises(Refusal, match="version 3: it does not go with .* 'age' is needed"):
        rollout.start(3)
    weights = {"3": 100}
    with pytest.raises(Refusal, match="'age' is refused, which callers send"):
        rollout.start(2)
    assert rollout.store.load("boarding") is None
    promote("boarding", 3, root=root)
    with pytest.raises(Refusal, match="version 1: it does not go with .* 'age' is refused"):
        rollout.start(1)                                                # it was served before: going back breaks callers as much
    assert rollout.store.load("boarding") is None
    told = rollout.start(1, reason="slow", breaking=True)
    assert told.candidate.version == "1" and told.reason.startswith("slow (breaking: it does not go with") and "age" in trail_reason(root)
    assert told.spec["policy"]["refusals"] is False                     # or the gate would take back what a person wants
    rollout.pointer.point("1", "3", "rollout engine", "slow")           # the traffic is there already: the registry does not stop half way
    assert champion("boarding", root=root).version == 1
    assert "input 'age' is refused" in events(open_state(state_url(root)), action="rolled_back")[-1]["evidence"]["breaking"]


def trail_reason(root):
    "Why the last rollout was begun"
    return events(open_state(state_url(root)), action="rollout pending")[-1]["reason"]


def test_a_breaking_rollout_is_said_to_be_one(root, bundles, tmp_path):
    for b in (bundles[0], made(tmp_path, "more", 4, ["age"])[0]):
        register(b, root=root)
    target = SimpleNamespace(routed=lambda: Routes({"1": 100}), revisions=lambda: [], size=lambda r: 1)
    rollout = Rollout(root, "boarding", (target, None))
    assert rollout.start(2, breaking=True).candidate.version == "2" and "'age' is needed" in trail_reason(root)


def test_a_policy_that_cannot_be_read_lets_nothing_through(root, bundles):
    for b in bundles[:2]:
        register(b, root=root)
    for text in ("approval: {approver: [bob]}", "approval: {needed: 0}", "approval: [bob", "aproval: {needed: 1}"):
        (root / "params.yaml").write_text(text)
        with pytest.raises(MlopsError):
            promote("boarding", 2, root=root)
        assert served("boarding", root=root)["version"] == 1


@pytest.fixture
def keys(monkeypatch):
    "A pair of keys, both configured"
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    monkeypatch.setenv("MLOPS_NB_SIGNING_KEY", key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption()).decode())
    monkeypatch.setenv("MLOPS_NB_PUBLIC_KEY", key.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo).decode())


def test_a_signed_bundle_goes_through_the_registry_and_an_unsigned_one_does_not(root, bundles, keys, tmp_path, monkeypatch):
    signed = made(tmp_path, "signed", 0)[0]
    assert signed.digest == bundles[0].digest
    ours, theirs = ({p.name: p.read_bytes() for p in b.path.iterdir()} for b in (signed, bundles[0]))
    assert ours.pop("manifest.sig") and ours == theirs
    assert register(signed, root=root).version == 1 and load_bundle(fetch_bundle("boarding", root=root)).compiled
    assert load_bundle(to_tar(signed, tmp_path / "b.tar")).digest == signed.digest
    with pytest.raises(MlopsError, match="not signed"):
        register(bundles[1], root=root)
    with pytest.raises(MlopsError, match="not signed"):
        load_bundle(bundles[1].path)
    monkeypatch.delenv("MLOPS_NB_SIGNING_KEY")
    with pytest.raises(MlopsError, match="not signed"):
        made(tmp_path, "unsigned", 2)
    assert not (tmp_path / "unsigned").exists()


def test_every_flipped_byte_of_a_signed_archive_is_found(keys, tmp_path):
    data = to_tar(made(tmp_path, "b", 0)[0], tmp_path / "b.tar").read_bytes()
    rng = np.random.default_rng(0)
    at = data.index(b"manifest.sig")
    places = [*range(at, at + 100, 7), *range(at + 512, at + 720, 5), *rng.integers(0, len(data), 40)]
    for i in places:
        (tmp_path / "c.tar").write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1:])
        with pytest.raises(MlopsError):
            load_bundle(tmp_path / "c.tar")


@contextlib.contextmanager
def serving(command, folder, ready, **env):
    "A server of other people, run until it answers at `ready`"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_TRACKING", "MLOPS_NB", "PYTHON"))}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen([str(c) for c in command], cwd=folder, stdout=log, stderr=log, env={**clean, **env, "PATH": f"{os.path.dirname(command[0])}:{os.environ['PATH']}"}, start_new_session=True)
    try:
        end = time.monotonic() + 180
        while True:
            assert process.poll() is None and time.monotonic() < end, (folder / "server.log").read_text()[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(ready, timeout=5) as answer:
                if answer.status == 200:
                    break
            time.sleep(0.1)
        yield
    finally:
        process.terminate()                                  # gently first: some servers' workers are in groups of their own
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait(180)


def posted(url, body):
    "What a server answers to JSON"
    asked = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(asked, timeout=300) as answer:
        return json.loads(answer.read())


@pytest.fixture
def exported(root, bundles, tmp_path):
    "A registered version, rows to ask it, what it answers; and a way to write it for another server"
    register(bundles[0], root=root)
    x = made(tmp_path, "b", 0)[2].head(8)
    return x, bundles[0].predict(x).tolist(), lambda form: export_version("boarding", "champion", form, tmp_path / form, root=root)


@pytest.mark.drill
def test_mlflows_own_server_answers_as_the_model_does(exported):
    x, want, export = exported
    folder, port = export("mlflow"), free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", folder, "-p", port, "-h", "127.0.0.1", "--env-manager", "local", "--workers", "1"]
    with serving(command, folder, f"http://127.0.0.1:{port}/ping"):
        said = posted(f"http://127.0.0.1:{port}/invocations", {"dataframe_split": json.loads(x.to_json(orient="split", date_format="iso"))})
    assert said["predictions"] == want


def tensors(x):
    "Rows in the open inference protocol, as MLServer's pandas codec reads them"
    def column(c):
        kind = x[c].dtype.kind
        values = [None if v != v or v is None else v for v in x[c].tolist()] if kind in "fO" else x[c].astype(str).tolist()
        return {"name": c, "shape": [len(x), 1], "datatype": "FP64" if kind == "f" else "BYTES", "data": values, "parameters": {"content_type": "np" if kind == "f" else "datetime" if kind == "M" else "str"}}
    return {"parameters": {"content_type": "pd"}, "inputs": [column(c) for c in x]}


@pytest.mark.drill
def test_mlserver_answers_as_the_model_does(exported):
    import peers

    x, want, export = exported
    full = x.dropna()                                        # its codec of texts has no word for a missing one
    folder, ports = export("mlflow"), [free_port() for _ in range(3)]
    (folder / "settings.json").write_text(json.dumps({"host": "127.0.0.1", "http_port": ports[0], "grpc_port": ports[1], "metrics_port": ports[2], "parallel_workers": 0}))
    tool = os.path.join(os.path.dirname(peers.python_of("mlserver")), "mlserver")
    with serving([tool, "start", folder], folder, f"http://127.0.0.1:{ports[0]}/v2/models/boarding/ready", PYTHONPATH=str(ROOT)):   # the preparation's types are ours
        said = posted(f"http://127.0.0.1:{ports[0]}/v2/models/boarding/infer", tensors(full))
    assert len(full) > 2 and said["model_version"] == "1"
    assert [bool(v) for v in said["outputs"][0]["data"]] == [w for w, there in zip(want, x.index.isin(full.index), strict=True) if there]


@pytest.mark.drill
def test_bentoml_answers_as_the_model_does(exported):
    import peers

    x, want, export = exported
    folder, port = export("bentoml"), free_port()
    tool = os.path.join(os.path.dirname(peers.python_of("bentoml-mlflow")), "bentoml")
    with serving([tool, "serve", "service:Model", "--port", port], folder, f"http://127.0.0.1:{port}/readyz", PYTHONPATH=str(ROOT)):
        ask = lambda rows: posted(f"http://127.0.0.1:{port}/predict", {"rows": rows})
        rows = json.loads(x.to_json(orient="records", date_format="iso"))
        assert ask(rows) == want
        number = next(c for c in x if x[c].dtype.kind == "f")
        assert len(ask([{**rows[0], number: 3}])) == 1                  # a whole number is a number
        for wrong in ({**rows[0], number: "much"}, {}):
            with pytest.raises(urllib.error.HTTPError, match="400"):
                ask([wrong])


@pytest.mark.drill
def test_what_an_image_is_built_from_answers_as_the_model_does(exported):
    "The image's command, in its folder"
    x, want, export = exported
    folder, port = export("docker"), free_port()
    command = next(json.loads(line[4:]) for line in (folder / "Dockerfile").read_text().splitlines() if line.startswith("CMD "))
    here = {"/srv/bundle": folder / "bundle", "0.0.0.0": "127.0.0.1", "8080": port}
    command = [os.path.join(os.path.dirname(sys.executable), command[0]), *(here.get(w, w) for w in command[1:command.index("--keys")])]
    with serving(command, folder, f"http://127.0.0.1:{port}/ready"):
        said = posted(f"http://127.0.0.1:{port}/predict", {"rows": json.loads(x.to_json(orient="records", date_format="iso"))})
    assert said["predictions"] == want


def test_a_backup_is_whole_while_others_write(tmp_path, monkeypatch):
    monkeypatch.delenv("MLOPS_NB_STATE_URL", raising=False)
    program = ("import sys; from mlops_nb.audit import append, open_state\nengine = open_state(sys.argv[1])\nwhile True: append(engine, actor='a', action='b', subject='c')")
    writer = subprocess.Popen([sys.executable, "-c", program, state_url(tmp_path)])
    try:
        until((tmp_path / ".mlops_nb" / "state.db").exists)
        seen, saved, end = [], None, time.monotonic() + 180
        while (not seen or seen[-1] < 30) and time.monotonic() < end:
            try:
                saved = backup_state(tmp_path / "copy", root=tmp_path)
            except MlopsError as e:
                assert "no audit trail" in str(e) or "no state" in str(e), e
                continue
            seen.append(saved["events"])
    finally:
        writer.kill()
        writer.wait(180)
    assert seen == sorted(seen) and seen[-1] >= 30
    assert restore_state(tmp_path / "copy", head=saved["head"], root=tmp_path)["events"] == seen[-1]
    assert verify(open_state(state_url(tmp_path)), saved["head"])["ok"]


def test_showing_the_trail_imports_nothing_slow(tmp_path, monkeypatch):
    monkeypatch.delenv("MLOPS_NB_STATE_URL", raising=False)
    (tmp_path / "params.yaml").write_text("base: {name: boarding}")
    open_state(state_url(tmp_path))
    program = ("import sys; from mlops_nb.cli import main; sys.argv = ['mlops-nb', 'audit', 'show', '--json']\n"
               "try: main()\nexcept SystemExit as e: print(e.code, {'pandas', 'sqlalchemy', 'mlflow', 'sklearn', 'polars', 'scipy'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.stdout.split("\n")[0] == "[]" and "0 set()" in done.stdout, done.stdout + done.stderr


def test_a_cut_tail_is_found_by_the_head_that_mlflow_keeps(root, bundles, monkeypatch):
    from typer.testing import CliRunner

    from mlops_nb.cli import app

    monkeypatch.chdir(root)
    (root / "params.yaml").write_text("base: {name: boarding}")
    for b in bundles[:2]:
        register(b, root=root)
    assert CliRunner().invoke(app, ["audit", "verify", "--anchored"]).exit_code == 0
    with sqlite3.connect(root / ".mlops_nb" / "state.db") as db:
        db.execute("DELETE FROM audit_events WHERE seq = 3")
    assert CliRunner().invoke(app, ["audit", "verify"]).exit_code == 0
    found = CliRunner().invoke(app, ["audit", "verify", "--anchored", "--json"])
    assert found.exit_code == 2 and "cut off" in json.loads(found.stdout)["reason"]


def test_postgresql_is_backed_up_and_restored_and_a_file_moves_to_it(tmp_path, postgres, monkeypatch):
    import sqlalchemy as sa

    from mlops_nb.registry.approval import open_approvals
    from mlops_nb.registry.store import set_pointer
    from mlops_nb.rollout.store import StateStore

    def fill(actor):
        engine, store = open_approvals(tmp_path), StateStore(tmp_path)
        with transaction(engine) as c:
            set_pointer(c, {"model": "boarding", "version": 1, "semver": "1.0.0", "digest": "d", "location": "l", "challenger": None, "trail": [1]})
            append(c, actor=actor, action="promoted", subject="boarding/1", evidence={"ü": [1.5, None]})
        store.wish("boarding", "pause", actor, "because")
        return engine

    monkeypatch.delenv("MLOPS_NB_STATE_URL", raising=False)
    fill("ada")
    from_file = backup_state(tmp_path / "file.backup", root=tmp_path)
    monkeypatch.setenv("MLOPS_NB_STATE_URL", postgres.new_database())
    engine = fill("bob")
    saved = backup_state(tmp_path / "server.backup", root=tmp_path)
    assert saved["head"] == verify(engine)["head"] and saved["head"] != from_file["head"]
    append(engine, actor="eve", action="promoted", subject="boarding/9")
    back = restore_state(tmp_path / "server.backup", head=saved["head"], root=tmp_path)
    assert [(e["actor"], e["action"]) for e in events(engine)] == [("bob", "promoted"), (whoami(), "state_restored")]
    assert verify(engine, saved["head"])["ok"] and served("boarding", root=tmp_path)["trail"] == [1]
    with engine.connect() as c:
        assert c.execute(sa.text(f"SELECT count(*) FROM {back['kept']}.audit_events")).scalar() == 2
    StateStore(tmp_path).wish("boarding", "resume", "bob", "numbers go on")
    moved = restore_state(tmp_path / "file.backup", head=from_file["head"], root=tmp_path)
    assert moved["events"] == 1 and events(engine)[0]["actor"] == "ada" and moved["kept"] != back["kept"]
    StateStore(tmp_path).wish("boarding", "resume", "bob", "numbers go on")
    with sqlite3.connect(tmp_path / "server.backup") as db:
        db.execute("UPDATE audit_events SET actor = 'eve'")
    db.close()
    before = events(engine)
    with pytest.raises(MlopsError, match="event 1 was changed"):
        restore_state(tmp_path / "server.backup", root=tmp_path)
    assert events(engine) == before


KILLED_AT = ["MlflowClient.set_model_version_tag", "append", "erase", "_erase", "MlflowClient.delete_logged_model", "MlflowClient.delete_model_version"]


@pytest.mark.parametrize("step", [s if s in ("append", "MlflowClient.delete_model_version") else pytest.param(s, marks=pytest.mark.drill) for s in KILLED_AT])
def test_a_clean_up_that_is_killed_leaves_versions_whole_or_gone(root, bundles, step):
    import mlflow

    import mlops_nb.registry.changes as changes
    import mlops_nb.registry.clean as cleaning
    from mlops_nb.registry import clean_versions, versions

    for b in bundles:
        register(b, root=root)

    def body():
        holder = mlflow.MlflowClient if "." in step else changes if step == "_erase" else cleaning
        setattr(holder, step.rpartition(".")[2], lambda *a, **k: os._exit(9))
        clean_versions("boarding", newest=1, days=0, root=root)

    assert run(body) == [9]
    listed, left = set(versions("boarding", root=root).version), {1, 3}
    assert left <= listed
    for v in listed:
        assert load_bundle(fetch_bundle("boarding", int(v), root=root)).compiled
    done = clean_versions("boarding", newest=1, days=0, root=root)
    assert set(versions("boarding", root=root).version) == left and [e["subject"] for e in events(open_state(state_url(root)), action="removed")] == ["boarding/2"]
    assert not any(r["removed"] for r in done) or [r["version"] for r in done if r["removed"]] == [2]
    assert len(list((root / ".mlops_nb/artifacts").rglob("manifest.json"))) == 2 and not list((root / ".mlops_nb/artifacts").rglob(f"{bundles[1].digest}*"))


def test_a_state_database_that_is_down_says_so_and_changes_nothing(root, bundles, monkeypatch):
    for b in bundles[:2]:
        register(b, root=root)
    before = trail(root)
    monkeypatch.setenv("MLOPS_NB_STATE_URL", "postgresql://ada:secret@127.0.0.1:1/state")
    for call in (lambda: promote("boarding", 2, root=root), lambda: rollback("boarding", root=root), lambda: register(bundles[2], root=root), lambda: served("boarding", root=root)):
        with pytest.raises(MlopsError, match=r"state database postgresql://ada:\*\*\*@127.0.0.1:1/state: .*check that it is there") as e:
            call()
        assert "\n" not in str(e.value) and "secret" not in str(e.value)
    monkeypatch.delenv("MLOPS_NB_STATE_URL")
    with open_store(root) as client:
        assert {int(v.version) for v in client.search_model_versions("name='boarding'")} == {1, 2}
    assert trail(root) == before and served("boarding", root=root)["version"] == 1
