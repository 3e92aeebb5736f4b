"What breaks an inference log: kill -9 of whoever writes or ships, databases that are down, slow, locked or full, full disks. Lost: 0, doubled: 0."
import contextlib
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter

import pytest
from servers import small_disk
from waiting import until

from mlops_nb.inference_log import (
    DatabaseDown,
    Feedback,
    InferenceLog,
    Prediction,
    Shipper,
    ShipperProcess,
    Spool,
    SpoolFull,
    forget,
    new_id,
    shipper_status,
)
from mlops_nb.inference_log.spool import segments

FORK = multiprocessing.get_context("fork")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    "A fresh log database"
    return f"sqlite:///{tmp_path}/log.db" if request.param == "sqlite" else request.getfixturevalue("postgres").new_database()


def answer(spool, rows=1):
    "What a server does: log, then answer; the ids that were answered"
    ids = [new_id() for _ in range(rows)]
    spool.append([Prediction(i, "flights", "3", "late", {"dep_hour": 17, "carrier": "UA"}, score=0.8, row=k) for k, i in enumerate(ids)])
    return ids


def serve(directory, out, rows, pause=0.0, **options):
    "A worker: answers until it is killed"
    spool = Spool(directory, **options)
    while True:
        os.write(out, "".join(f"{i}\n" for i in answer(spool, rows)).encode())
        if pause:
            time.sleep(pause)


@contextlib.contextmanager
def workers(directory, n=3, rows=2, **options):
    "Workers that answer until the block ends, then die by kill -9; filled with the ids they answered"
    answered, pipes, processes = [], [], []
    for _ in range(n):
        end, out = os.pipe()
        processes.append(FORK.Process(target=serve, args=(directory, out, rows), kwargs=options))
        processes[-1].start()
        os.close(out)
        pipes.append(os.fdopen(end))
    readers = [threading.Thread(target=lambda pipe=pipe: answered.extend(line.strip() for line in pipe if line.endswith("\n"))) for pipe in pipes]
    for r in readers:
        r.start()
    try:
        yield answered, processes
    finally:
        for p in processes:
            p.kill()
        for p in [*processes, *readers]:
            p.join(180)


def stored(url):
    "How often each id is in the log"
    with InferenceLog(url).transaction(only_reads=True) as c:
        return Counter(c.exec_driver_sql("SELECT prediction_id FROM predictions").scalars())


def nothing_lost(url, answered, unanswered=0):
    "Every answered id once; besides them at most what was logged when its worker was killed before it could answer"
    found = stored(url)
    assert len(answered) > 100
    lost, doubled = set(answered) - set(found), [i for i, n in found.items() if n > 1]
    assert (len(lost), len(doubled)) == (0, 0)
    assert len(found) - len(set(answered)) <= unanswered


def test_kill_of_every_worker_at_any_time(tmp_path, url):
    answered = []
    for _ in range(4):
        with workers(tmp_path / "spool", segment=50_000) as (ids, _):
            until(lambda ids=ids: len(ids) > 500)
        answered += ids
    shipper = Shipper(tmp_path / "spool", url)
    shipper.ship()
    nothing_lost(url, answered, unanswered=4 * 3 * 2)
    assert segments(tmp_path / "spool") == []
    assert shipper.status["damaged"] == shipper.status["rejected"] == 0


@pytest.mark.drill
def test_kill_of_the_shipper_again_and_again(tmp_path, url):
    keeper = ShipperProcess(tmp_path / "spool", url).start()
    with workers(tmp_path / "spool", pause=0.003, segment=20_000) as (answered, _):
        for n in range(1, 6):
            until(lambda n=n: keeper.process and keeper.process.poll() is None and len(answered) > 400 * n and shipper_status(tmp_path / "spool"))
            time.sleep(0.05 * n)
            keeper.process.kill()
            (tmp_path / "spool/shipper.json").unlink(missing_ok=True)
    until(lambda: not segments(tmp_path / "spool"))
    keeper.stop()
    nothing_lost(url, answered, unanswered=6)


def test_several_shippers_at_once_double_nothing(tmp_path, url):
    "Every append makes a segment of its own here: that a shipper finds a file which is made and not yet locked is an everyday event"
    InferenceLog(url).write([])
    with workers(tmp_path / "spool", pause=0.001, segment=1) as (answered, _):
        stop = threading.Event()
        shippers = [threading.Thread(target=Shipper(tmp_path / "spool", url).run, args=(stop, 0.001)) for _ in range(3)]
        for s in shippers:
            s.start()
        until(lambda: len(answered) > 1500)
    until(lambda: not segments(tmp_path / "spool"))
    stop.set()
    for s in shippers:
        s.join()
    nothing_lost(url, answered, unanswered=6)


@pytest.mark.drill
def test_one_of_many_keepers_ships_and_another_takes_over(tmp_path):
    url = f"sqlite:///{tmp_path}/log.db"
    keepers = [ShipperProcess(tmp_path / "spool", url).start() for _ in range(3)]
    alive = lambda: [k for k in keepers if k.process and k.process.poll() is None]
    first = until(lambda: shipper_status(tmp_path / "spool") and len(alive()) == 1 and alive())
    first[0].stop()
    spool = Spool(tmp_path / "spool")
    answered = [i for _ in range(200) for i in answer(spool)]
    spool.close()
    until(lambda: not segments(tmp_path / "spool"))
    for k in keepers:
        if k is not first[0]:
            k.stop()
    nothing_lost(url, answered)


def keep(directory, url, answered):
    "A server that has a shipper and answers until it is killed"
    ShipperProcess(directory, url).start()
    serve(directory, answered, 1, pause=0.001)


def test_what_a_killed_server_answered_is_shipped_though_its_parent_is_gone(tmp_path):
    url, (end, out) = f"sqlite:///{tmp_path}/log.db", os.pipe()
    server = FORK.Process(target=keep, args=(tmp_path / "spool", url, out))
    server.start()
    os.close(out)
    pipe = os.fdopen(end)
    answered = [pipe.readline().strip() for _ in range(200)]
    until(lambda: shipper_status(tmp_path / "spool"))
    os.kill(server.pid, signal.SIGKILL)
    answered += pipe.read().split()
    until(lambda: not segments(tmp_path / "spool"))
    nothing_lost(url, answered, unanswered=1)


def test_postgres_is_killed_and_comes_back(tmp_path, postgres):
    url = postgres.new_database()
    keeper = ShipperProcess(tmp_path / "spool", url).start()
    with workers(tmp_path / "spool", pause=0.001, segment=100_000) as (answered, _):
        try:
            until(lambda: shipper_status(tmp_path / "spool").get("records", 0) > 300)
            postgres.kill()
            before = len(answered)
            until(lambda: shipper_status(tmp_path / "spool").get("error"))
            until(lambda: len(answered) > before + 1000)
        finally:
            postgres.start()
        until(lambda: not shipper_status(tmp_path / "spool")["error"])
    until(lambda: not segments(tmp_path / "spool"))
    keeper.stop()
    nothing_lost(url, answered, unanswered=6)


def test_a_database_that_does_not_answer_holds_up_nobody(tmp_path, postgres):
    url, spool = postgres.new_database(), Spool(tmp_path / "spool")
    InferenceLog(url).write([])
    keeper = ShipperProcess(tmp_path / "spool", url).start()
    until(lambda: shipper_status(tmp_path / "spool"))
    group = os.getpgid(postgres.process.pid)
    try:
        os.killpg(group, signal.SIGSTOP)
        answered = [i for _ in range(2000) for i in answer(spool)]      # whoever waited for the database would wait for ever
        assert spool.usage.used > 2000 * 100
    finally:
        os.killpg(group, signal.SIGCONT)
    spool.close()
    until(lambda: not segments(tmp_path / "spool"))
    keeper.stop()
    nothing_lost(url, answered)


def test_a_database_that_is_down_at_the_start(tmp_path):
    url = f"sqlite:///{tmp_path}/not yet/log.db"
    spool, keeper = Spool(tmp_path / "spool"), ShipperProcess(tmp_path / "spool", url).start()
    answered = [i for _ in range(200) for i in answer(spool)]
    until(lambda: "check that it is there" in shipper_status(tmp_path / "spool").get("error", ""))
    (tmp_path / "not yet").mkdir()
    spool.close()
    until(lambda: not segments(tmp_path / "spool"))
    keeper.stop()
    nothing_lost(url, answered)


def test_a_locked_database_is_waited_for(tmp_path):
    url, spool = f"sqlite:///{tmp_path}/log.db?timeout=0.1", Spool(tmp_path / "spool")
    shipper = Shipper(tmp_path / "spool", url)
    shipper.log.write([])
    with contextlib.closing(sqlite3.connect(tmp_path / "log.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        answered = [i for _ in range(200) for i in answer(spool)]
        with pytest.raises(DatabaseDown, match="locked"):
            shipper.ship()
        other.execute("COMMIT")
    assert shipper.ship() == 200
    nothing_lost(url, answered)


def test_a_database_that_was_replaced_by_an_empty_one(tmp_path, url):
    spool, shipper = Spool(tmp_path / "spool"), Shipper(tmp_path / "spool", url)
    answer(spool)
    shipper.ship()
    with shipper.log.transaction() as c:
        for table in ("predictions", "feedback", "log_columns", "forgotten"):
            c.exec_driver_sql(f"DROP TABLE {table}")
    answered = [i for _ in range(200) for i in answer(spool)]
    with pytest.raises(DatabaseDown):
        shipper.ship()
    shipper.ship()
    nothing_lost(url, answered, unanswered=1)
    assert shipper.status["rejected"] == 0
    assert "dep_hour" in InferenceLog(url).window()


def test_keys_that_no_index_takes(tmp_path, url):
    spool = Spool(tmp_path / "spool")
    long = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))
    spool.append([Prediction(new_id(), long, long, long, {long: long, "x": 1}, request_id=long, entity=long, caller=long), Feedback(long, long, long, comment=long, caller=long)])
    answered = [i for _ in range(200) for i in answer(spool)]
    shipper = Shipper(tmp_path / "spool", url)
    shipper.ship()
    nothing_lost(url, answered, unanswered=1)
    assert shipper.status["rejected"] == 0
    assert forget(shipper.log, long) == 1


@pytest.fixture
def full_disk(tmp_path):
    "A disk of 1 MB"
    with small_disk(tmp_path / "disk", "1m") as place:
        yield place


def fill(spool):
    "Answer until the spool refuses; what was answered"
    answered = []
    with contextlib.suppress(SpoolFull):
        while True:
            answered += answer(spool, rows=3)
    return answered


def test_a_full_disk_under_the_spool(tmp_path, full_disk):
    spool, url = Spool(full_disk / "spool"), f"sqlite:///{tmp_path}/log.db"
    answered = fill(spool)
    assert spool.usage.near_bound
    with pytest.raises(SpoolFull, match="bound|disk"):
        answer(spool, 3)
    shipper = Shipper(spool.directory, url)
    assert shipper.ship() == len(answered)
    shipper.ship()
    answered += answer(spool)
    shipper.ship()
    nothing_lost(url, answered)
    assert shipper.status["damaged"] == 0


def test_a_disk_that_fills_up_while_a_frame_is_written(tmp_path, full_disk):
    "Something else takes the room between the look at the disk and the write: every frame is whole or not there"
    spool, url = Spool(full_disk / "spool"), f"sqlite:///{tmp_path}/log.db"
    answered = answer(spool)
    with contextlib.suppress(OSError), full_disk.joinpath("other").open("wb", buffering=0) as other:
        while other.write(bytes(4096)):
            pass
    answered += fill(spool)
    full_disk.joinpath("other").unlink()
    answered += [i for _ in range(300) for i in answer(spool)]
    spool.close()
    shipper = Shipper(spool.directory, url)
    shipper.ship()
    nothing_lost(url, answered)
    assert shipper.status["damaged"] == 0


def test_a_full_disk_under_the_database(tmp_path, full_disk):
    spool, url = Spool(tmp_path / "spool", segment=100_000), f"sqlite:///{full_disk}/log.db"
    shipper = Shipper(spool.directory, url)
    shipper.log.write([])
    answered = [i for _ in range(2000) for i in answer(spool, rows=3)]
    with pytest.raises(DatabaseDown, match="full"):
        for _ in range(100):
            shipper.ship()
    subprocess.run(["mount", "-o", "remount,size=20m", str(full_disk)], check=True)
    shipper.ship()
    spool.close()
    shipper.ship()
    assert segments(spool.directory) == []
    nothing_lost(url, answered)


def test_the_bound_refuses_rather_than_loses(tmp_path, url):
    spool = Spool(tmp_path / "spool", bound=500_000, segment=100_000)
    answered, near = [], []
    with pytest.raises(SpoolFull, match="database down"):
        while True:
            answered += answer(spool)
            near.append(spool.usage.near_bound)
    assert near.index(True) / len(near) == pytest.approx(0.8, abs=0.05)
    with pytest.raises(SpoolFull):
        answer(spool)
    assert spool.usage.used <= 500_000
    shipper = Shipper(spool.directory, url)
    shipper.ship()
    answered += [i for _ in range(100) for i in answer(spool)]
    shipper.ship()
    nothing_lost(url, answered)


def test_the_bound_holds_for_all_workers_together(tmp_path):
    with workers(tmp_path / "spool", n=1, rows=1, bound=2_000_000, segment=200_000) as (_, processes):
        processes[0].join(600)
    spool = Spool(tmp_path / "spool", bound=2_000_000)
    assert 1_900_000 < spool.usage.used <= 2_000_000
    with pytest.raises(SpoolFull):
        answer(spool)


def test_threads_share_a_spool(tmp_path, url):
    spool, answered = Spool(tmp_path / "spool", segment=20_000), []
    threads = [threading.Thread(target=lambda: answered.extend(i for _ in range(300) for i in answer(spool, 2))) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    spool.close()
    Shipper(spool.directory, url).ship()
    nothing_lost(url, answered)


def test_the_clock_jumps_back(tmp_path, url, monkeypatch):
    real, spool = time.time, Spool(tmp_path / "spool", segment=1000)
    answered = [i for _ in range(60) for i in answer(spool)]
    spool.append([Feedback(new_id(), answered[0], "late")])
    monkeypatch.setattr(time, "time", lambda: real() - 7200)
    monkeypatch.setattr(time, "time_ns", lambda: int((real() - 7200) * 1e9))
    answered += [i for _ in range(60) for i in answer(spool)]
    spool.append([Feedback(new_id(), answered[0], "on time")])
    spool.close()
    Shipper(spool.directory, url).ship()
    nothing_lost(url, answered)
    window = InferenceLog(url).window()
    assert window.time.is_monotonic_increasing
    assert window.set_index("prediction_id").feedback[answered[0]] == "on time"


def test_feedback_late_early_repeated_corrected(tmp_path, url):
    spool = Spool(tmp_path / "spool")
    a, b, c, d = answer(spool, 4)
    say = lambda prediction, label, **kw: Feedback(new_id(), prediction, label, **kw)
    once = say(b, "late")
    spool.append([say("never answered", "late"), say(a, "late"), once])
    spool.append([say(a, "on time"), once])
    spool.append([say(c, "on time", time=2000.0), say(c, "late", time=1000.0)])
    shipper = Shipper(spool.directory, url)
    shipper.ship()
    early = new_id()
    spool.append([say(early, "late")])
    shipper.ship()
    spool.append([Prediction(early, "flights", "3", "on time", {})])
    shipper.ship()
    window = InferenceLog(url).window().set_index("prediction_id")
    assert window.feedback.fillna("-").to_dict() == {a: "on time", b: "late", c: "on time", d: "-", early: "late"}
    with InferenceLog(url).transaction(only_reads=True) as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM feedback").scalar() == 7
    assert len(InferenceLog(url).window(labelled=True)) == 4
