"Approval under several processes and on two databases, a signed bundle flipped byte by byte, an export behind MLflow's own server, the audit commands' speed in what they import."
# ruff: noqa: F811
import json
import os
import sqlite3
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from servers import free_port
from versions import anyroot, bundles, empty_store, made, quietly, root, run, trail  # noqa: F401  (fixtures)

from mlops_nb.audit import events, open_state, verify
from mlops_nb.bundle import load_bundle, to_tar
from mlops_nb.core import MlopsError, Refusal, state_url
from mlops_nb.governance import backup_state, restore_state
from mlops_nb.registry import approve, champion, export_version, fetch_bundle, promote, register, rollback, served
from mlops_nb.registry import request as request_review
from mlops_nb.rollout.run import RegistryPointer


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
    votes = [(who, v) for v in (1, 2) for who in ("ada", "bob", "ada")]
    assert sorted(run(*(quietly(acting(who, approve, "boarding", v, root=root)) for who, v in votes))) == [0, 0, 0, 0, 3, 3]
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


@pytest.mark.drill
def test_mlflows_own_server_answers_as_the_model_does(root, bundles, tmp_path):
    register(bundles[0], root=root)
    folder, x, port = export_version("boarding", "champion", "mlflow", tmp_path / "out", root=root), made(tmp_path, "b", 0)[2].head(8), free_port()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_TRACKING", "MLOPS_NB"))}
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(folder), "-p", str(port), "-h", "127.0.0.1", "--env-manager", "local", "--workers", "1"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**env, "PATH": f"{os.path.dirname(sys.executable)}:{env['PATH']}"}, start_new_session=True)
    try:
        end, ready = time.monotonic() + 90, False
        while not ready and time.monotonic() < end and server.poll() is None:
            try:
                ready = urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).status == 200
            except OSError:
                time.sleep(0.1)
        assert ready, (tmp_path / "log").read_text()[-2000:]
        body = json.dumps({"dataframe_split": json.loads(x.to_json(orient="split", date_format="iso"))}).encode()
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, {"content-type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            said = json.loads(answer.read())["predictions"]
    finally:
        os.killpg(server.pid, 9)
        server.wait(30)
    assert said == bundles[0].predict(x).tolist()


def test_a_backup_is_whole_while_others_write(tmp_path, monkeypatch):
    monkeypatch.delenv("MLOPS_NB_STATE_URL", raising=False)
    program = ("import sys; from mlops_nb.audit import append, open_state\nengine = open_state(sys.argv[1])\nwhile True: append(engine, actor='a', action='b', subject='c')")
    writer = subprocess.Popen([sys.executable, "-c", program, state_url(tmp_path)])
    try:
        end = time.monotonic() + 60
        while not (tmp_path / ".mlops_nb" / "state.db").exists() and time.monotonic() < end:
            time.sleep(0.05)
        seen, saved = [], None
        while (not seen or seen[-1] < 30) and time.monotonic() < end:
            try:
                saved = backup_state(tmp_path / "copy", root=tmp_path)
            except MlopsError as e:
                assert "no such table" in str(e) or "no state" in str(e), e
                continue
            seen.append(saved["events"])
    finally:
        writer.kill()
        writer.wait(30)
    assert seen == sorted(seen) and seen[-1] >= 30
    assert restore_state(tmp_path / "copy", head=saved["head"], root=tmp_path)["events"] == seen[-1]
    assert verify(open_state(state_url(tmp_path)), saved["head"])["ok"]


def test_showing_the_trail_imports_nothing_slow(tmp_path, monkeypatch):
    monkeypatch.delenv("MLOPS_NB_STATE_URL", raising=False)
    (tmp_path / "params.yaml").write_text("base: {name: boarding}")
    open_state(state_url(tmp_path))
    program = ("import sys; from mlops_nb.cli import main; sys.argv = ['mlops-nb', 'audit', 'show', '--json']\n"
               "try: main()\nexcept SystemExit as e: print(e.code, {'pandas', 'sqlalchemy', 'mlflow', 'sklearn', 'polars', 'scipy'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
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
