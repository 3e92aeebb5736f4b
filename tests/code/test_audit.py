"The audit trail under several processes, and every way of tampering with it that a column or a byte allows."
import multiprocessing
import random
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from mlops_nb.audit import GENESIS, append, create_tables, events, export_jsonl, head, open_state, reading, transaction, verify, verify_jsonl, whoami
from mlops_nb.core import MlopsError

FIELDS = ["time", "actor", "action", "subject", "reason", "evidence", "prev", "hash"]
FORK = multiprocessing.get_context("fork")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    "A fresh state database"
    return f"sqlite:///{tmp_path}/state.db" if request.param == "sqlite" else request.getfixturevalue("postgres").new_database()


def filled(url, n=5):
    engine = open_state(url)
    for i in range(n):
        append(engine, actor="ada", action="promoted", subject=f"flights/{i}", reason="better", evidence={"auc": i / 7, "rows": [i, None, "ü"]})
    return engine


def writer(url, name, n, start):
    start.wait()
    engine = open_state(url)
    for i in range(n):
        append(engine, actor=name, action="scored", subject=f"{name}/{i}")


def test_several_processes_open_and_append_at_once(url):
    start = FORK.Event()
    workers = [FORK.Process(target=writer, args=(url, f"w{k}", 25, start)) for k in range(6)]
    for w in workers:
        w.start()
    start.set()
    for w in workers:
        w.join(300)
    assert [w.exitcode for w in workers] == [0] * 6
    engine = open_state(url)
    found = events(engine)
    assert [e["seq"] for e in found] == list(range(1, 151))
    assert {e["subject"] for e in found} == {f"w{k}/{i}" for k in range(6) for i in range(25)}
    assert [e["subject"] for e in found if e["actor"] == "w3"] == [f"w3/{i}" for i in range(25)]
    assert verify(engine, head(engine))["ok"]


def test_an_engine_crosses_a_fork(url):
    engine = filled(url)
    child = FORK.Process(target=append, args=(engine,), kwargs={"actor": "child", "action": "a", "subject": "s"})
    child.start()
    child.join(300)
    append(engine, actor="parent", action="a", subject="s")
    assert child.exitcode == 0
    assert [e["actor"] for e in events(engine, limit=2)] == ["child", "parent"]
    assert verify(engine)["ok"]


def test_an_event_is_committed_with_its_change_or_not_at_all(url):
    engine, other = filled(url), sa.MetaData()
    pointer = sa.Table("pointer", other, sa.Column("model", sa.Text, primary_key=True), sa.Column("version", sa.Integer))
    create_tables(engine, other)
    with transaction(engine) as c:
        c.execute(pointer.insert().values(model="flights", version=1))
        append(c, actor="ada", action="promoted", subject="flights/1")
    with pytest.raises(sa.exc.IntegrityError), transaction(engine) as c:
        append(c, actor="bob", action="promoted", subject="flights/2")
        c.execute(pointer.insert().values(model="flights", version=2))
    assert [e["actor"] for e in events(engine, action="promoted")].count("bob") == 0
    assert len(events(engine)) == 6
    assert verify(engine)["ok"]


def test_a_reader_sees_one_state_and_blocks_no_writer(tmp_path):
    engine = filled(f"sqlite:///{tmp_path}/state.db", 2)
    with reading(engine) as c:
        count = lambda: c.execute(sa.text("SELECT count(*) FROM audit_events")).scalar()
        assert count() == 2
        append(engine, actor="a", action="b", subject="c")
        assert count() == 2
    assert len(events(engine)) == 3


def test_tampering_with_any_field_of_any_row_is_found(tmp_path_factory):
    path = tmp_path_factory.mktemp("audit") / "state.db"
    engine = filled(f"sqlite:///{path}", 6)
    anchor = head(engine)

    @given(row=st.integers(1, 6), field=st.sampled_from(FIELDS), value=st.text(max_size=8) | st.binary(max_size=4) | st.integers(-2, 9))
    def check(row, field, value):
        db = sqlite3.connect(path)
        try:
            old = db.execute(f"SELECT {field} FROM audit_events WHERE seq = ?", (row,)).fetchone()[0]
            with db:
                db.execute(f"UPDATE audit_events SET {field} = ? WHERE seq = ?", (value, row))
            now = db.execute(f"SELECT {field} FROM audit_events WHERE seq = ?", (row,)).fetchone()[0]
            if now != old:
                verdict = verify(engine, anchor)
                assert not verdict["ok"] and verdict["first_bad"] == row and verdict["reason"]
            with db:
                db.execute(f"UPDATE audit_events SET {field} = ? WHERE seq = ?", (old, row))
        finally:
            db.close()
        assert verify(engine, anchor)["ok"]

    check()


def test_evidence_nested_beyond_all_bounds_is_found_as_well(tmp_path):
    engine = open_state(f"sqlite:///{tmp_path}/state.db")
    for i in range(3):
        append(engine, actor="a", action="b", subject=f"c/{i}")
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE audit_events SET evidence = ? WHERE seq = 2", ("[" * 100_000 + "]" * 100_000,))
    assert verify(engine)["first_bad"] == 2 and len(events(engine)) == 3
    export_jsonl(engine, tmp_path / "trail.jsonl")
    assert verify_jsonl(tmp_path / "trail.jsonl")["first_bad"] == 2


@given(st.permutations(range(6)), st.integers(0, 6))
def test_removing_reordering_and_cutting_lines_is_found(order, keep):
    import tempfile

    with tempfile.TemporaryDirectory() as tmp:
        engine = filled("sqlite://", 6)
        file = Path(tmp) / "audit.jsonl"
        anchor = export_jsonl(engine, file)
        lines = file.read_bytes().splitlines(True)
        file.write_bytes(b"".join([lines[i] for i in order][:keep]))
        verdict = verify_jsonl(file, anchor)
        first = next((n + 1 for n, i in enumerate(order[:keep]) if n != i), keep + 1)
        assert verdict["ok"] == (first == 7)
        assert verdict["first_bad"] == (None if first == 7 else first)


def test_every_flipped_byte_of_an_export_is_found(tmp_path):
    engine = filled("sqlite://", 2)
    file = tmp_path / "audit.jsonl"
    anchor = export_jsonl(engine, file)
    good = file.read_bytes()
    for i in range(len(good)):
        for mask in (1, 128, 32):
            file.write_bytes(good[:i] + bytes([good[i] ^ mask]) + good[i + 1:])
            assert not verify_jsonl(file, anchor)["ok"], (i, mask)


def test_a_state_of_an_earlier_release_gets_what_it_lacks_and_keeps_what_it_has(url):
    engine, text = filled(url), lambda name, **kw: sa.Column(name, sa.Text, **kw)
    old, new = sa.MetaData(), sa.MetaData()
    before = sa.Table("pointers", old, text("model", primary_key=True), text("version", nullable=False))
    create_tables(engine, old)
    with transaction(engine) as c:
        c.execute(before.insert().values(model="flights", version="1"))
    after = sa.Table("pointers", new, text("model", primary_key=True), text("version", nullable=False), text("note", index=True), text("kind", nullable=False, server_default="plain"))
    sa.Table("other", new, text("name", primary_key=True))
    start = FORK.Event()
    workers = [FORK.Process(target=lambda: (start.wait(), create_tables(open_state(url), new))) for _ in range(4)]
    for w in workers:
        w.start()
    start.set()
    for w in workers:
        w.join(300)
    assert [w.exitcode for w in workers] == [0] * 4
    with transaction(engine) as c:
        c.execute(before.insert().values(model="trains", version="2"))         # the earlier release goes on beside it
        assert [tuple(r) for r in c.execute(after.select().order_by(after.c.model))] == [("flights", "1", None, "plain"), ("trains", "2", None, "plain")]
        assert {i["name"] for i in sa.inspect(c).get_indexes("pointers")} == {"ix_pointers_note"} and sa.inspect(c).has_table("other")
    assert verify(engine)["ok"]


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3), max_leaves=8),
       st.text(), st.text())
def test_any_evidence_survives_the_round_trip(evidence, actor, subject):
    engine = open_state("sqlite://")
    event = append(engine, actor=actor, action="a", subject=subject, evidence=evidence)
    assert events(engine) == [event]
    assert verify(engine, event["hash"])["ok"]


def test_the_whole_chain_written_anew_is_found_by_the_anchor(tmp_path):
    first, second = filled(f"sqlite:///{tmp_path}/a.db"), filled(f"sqlite:///{tmp_path}/b.db", 7)
    assert verify(second)["ok"]
    assert not verify(second, head(first))["ok"]
    assert verify(second, GENESIS)["ok"]


def test_a_database_that_fails_says_so_in_one_line(tmp_path):
    path = tmp_path / "state.db"
    engine = filled(f"sqlite:///{path}", 60)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    data = bytearray(path.read_bytes())
    data[5000:9000] = random.Random(0).randbytes(4000)
    path.write_bytes(data)
    for call in (lambda: verify(engine), lambda: append(engine, actor="a", action="b", subject="c")):
        try:
            assert call() and not verify(engine)["ok"]
        except MlopsError as e:
            assert "state.db" in str(e) and "\n" not in str(e)
    with pytest.raises(MlopsError, match="absent"):
        open_state(f"sqlite:///{tmp_path}/absent/state.db")
    with pytest.raises(MlopsError, match=r"postgresql.*\*\*\*"):
        open_state("postgresql://user:secret@127.0.0.1:1/x")
    with pytest.raises(MlopsError) as e:
        open_state("postgresql://user:secret@127.0.0.1:1/x")
    assert "secret" not in str(e.value)


def test_a_database_that_is_locked_too_long_is_an_error_and_changes_nothing(tmp_path):
    engine = filled(f"sqlite:///{tmp_path}/state.db", 1)
    impatient = open_state(f"sqlite:///{tmp_path}/state.db?timeout=0.1")
    with transaction(engine) as c:
        append(c, actor="a", action="b", subject="c")
        with pytest.raises(MlopsError, match="locked"):
            append(impatient, actor="x", action="y", subject="z")
    assert [e["actor"] for e in events(engine)] == ["ada", "a"]


def test_whoami(monkeypatch):
    monkeypatch.setenv("MLOPS_NB_ACTOR", "ci")
    assert whoami() == "ci"
    monkeypatch.delenv("MLOPS_NB_ACTOR")
    assert whoami()
