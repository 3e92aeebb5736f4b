"""The inference log: what an append costs a server, what the shipper costs beside it, how fast it ships, how fast and in what memory a window is read.

    .venv/bin/python benchmarks/inference_log.py [ROWS]

One record is a prediction with 12 numbers and 4 categories. Beside the append: what one would write by hand, a line of JSON through `logging`
and an INSERT with a commit into SQLite. PostgreSQL is measured where it is installed. Writes benchmarks/results/inference_log.json.
"""
import json
import logging
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import common
from mlops_nb.inference_log import InferenceLog, Prediction, Shipper, ShipperProcess, Spool, new_id, shipper_status

sys.path.append(str(common.ROOT / "tests"))
import servers  # noqa: E402

FEATURES = {f"feature_{i}": 1.2345 * i for i in range(12)} | {f"category_{i}": f"level{i}" for i in range(4)}


def record() -> Prediction:
    "One prediction, as a server makes it"
    return Prediction(new_id(), "flights", "3", "late", FEATURES, 0.83, 0.7, "request", 0, "N14228", "me")


def cost(action, n: int) -> dict:
    "Microseconds of wall time (median, 99th percentile) and of CPU of an action, and how often it runs in a second"
    took, clock, cpu = [], time.perf_counter, time.process_time()
    for _ in range(n):
        start = clock()
        action()
        took.append(clock() - start)
    cpu, took = time.process_time() - cpu, sorted(took)
    return {"p50_us": round(took[n // 2] * 1e6, 2), "p99_us": round(took[n * 99 // 100] * 1e6, 2), "cpu_us": round(cpu / n * 1e6, 2), "per_second": round(n / sum(took))}


def appends(folder: Path, n: int) -> dict:
    "What it costs to write one record down, in several ways"
    spool, synced, row = Spool(folder / "spool"), Spool(folder / "synced", sync=True), record()
    logger = logging.Logger("predictions")
    logger.addHandler(logging.FileHandler(folder / "log.jsonl"))
    table = sqlite3.connect(folder / "by hand.db", isolation_level=None)
    table.execute("PRAGMA journal_mode=WAL")
    table.execute("CREATE TABLE p (id TEXT PRIMARY KEY, body TEXT)")
    plain = {name: getattr(row, name) for name in row.__struct_fields__}
    batch = [record() for _ in range(32)]
    found = {
        "making the record and its id": cost(record, n),
        "Spool.append": cost(lambda: spool.append([row]), n),
        "Spool.append, 32 records": cost(lambda: spool.append(batch), n // 32),
        "Spool.append, sync": cost(lambda: synced.append([row]), min(n, 500)),
        "logging and json.dumps": cost(lambda: logger.info(json.dumps(plain)), n),
        "INSERT and commit, SQLite": cost(lambda: table.execute("INSERT INTO p VALUES (?, ?)", (new_id(), json.dumps(plain))), min(n, 2000)),
    }
    found["bytes a record"] = round(spool.usage.used / (n + n // 32 * 32))
    return found


def several(folder: Path, n: int, workers: int) -> float:
    "Appends in a second of several processes together"
    code = f"""if True:
        import sys; sys.path.insert(0, {str(common.ROOT / 'benchmarks')!r})
        from inference_log import *
        spool, row = Spool(sys.argv[1]), record()
        print(); sys.stdin.readline()
        for _ in range({n}): spool.append([row])"""
    running = [subprocess.Popen([sys.executable, "-c", code, folder / "several"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(workers)]
    for p in running:
        p.stdout.readline()
    start = time.perf_counter()
    for p in running:
        p.stdin.write(b"\n")
        p.stdin.close()
    for p in running:
        p.wait()
    return round(workers * n / (time.perf_counter() - start))


def beside(folder: Path, how: str, seconds: float) -> dict:
    "A loop that works for 100 us and appends, 1,500 times a second, with a shipper as a thread, as a process, or none"
    spool, url, stop = Spool(folder / how, segment=1 << 20), f"sqlite:///{folder}/{how}.db", threading.Event()
    InferenceLog(url).write([])
    helper = ShipperProcess(spool.directory, url) if how == "process" else threading.Thread(target=Shipper(spool.directory, url).run, args=(stop,))
    if how != "none":
        helper.start()
        while not shipper_status(spool.directory):
            time.sleep(0.05)
    took, end, due = [], time.perf_counter() + seconds, time.perf_counter()
    while (now := time.perf_counter()) < end:
        if now < due:
            time.sleep(due - now)
        start = time.perf_counter()
        while time.perf_counter() - start < 100e-6:
            pass
        spool.append([record()])
        took.append(time.perf_counter() - start)
        due += 1 / 1500
    stop.set()
    if how == "process":
        helper.stop()
    took.sort()
    return {f"p{p}_us": round(took[int(len(took) * p / 100)] * 1e6) for p in (50, 99, 99.9)}


def ship(url: str, folder: Path, n: int) -> dict:
    "Records shipped in a second, and the processor's time for one"
    spool = Spool(folder / f"ship{os.urandom(4).hex()}", bound=8 << 30)
    for _ in range(n // 1000):
        spool.append([record() for _ in range(1000)])
    spool.close()
    shipper = Shipper(spool.directory, url)
    start, cpu = time.perf_counter(), time.process_time()
    moved = shipper.ship()
    return {"records": moved, "per_second": round(moved / (time.perf_counter() - start)), "cpu_us": round((time.process_time() - cpu) / moved * 1e6, 1)}


READ = """if True:
    import sys, time
    import pandas, pyarrow, sqlalchemy
    from mlops_nb.inference_log import InferenceLog
    peak = lambda: next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    before, start = peak(), time.perf_counter()
    log = InferenceLog(sys.argv[1])
    rows = sum(b.num_rows for b in log.batches()) if sys.argv[2] == "batches" else len(log.window())
    print(rows, time.perf_counter() - start, peak() - before)"""


def read(url: str, how: str) -> dict:
    "Reading the whole log in a process of its own: rows, seconds, MB it needed"
    rows, seconds, memory = subprocess.run([sys.executable, "-c", READ, url, how], capture_output=True, text=True, check=True).stdout.split()
    return {"rows": int(rows), "seconds": round(float(seconds), 1), "rows_per_second": round(int(rows) / float(seconds)), "added_mb": round(float(memory))}


def shipper_memory(folder: Path) -> int:
    "Resident MB of an idle shipper process"
    keeper = ShipperProcess(folder / "idle", f"sqlite:///{folder}/idle.db").start()
    while not shipper_status(folder / "idle"):
        time.sleep(0.05)
    rss = next(int(line.split()[1]) // 1024 for line in Path(f"/proc/{keeper.process.pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    keeper.stop()
    return rss


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    figures = {"machine": common.machine("msgspec", "sqlalchemy", "pyarrow"), "rows": rows}
    with tempfile.TemporaryDirectory() as tmp:
        folder, url = Path(tmp), f"sqlite:///{tmp}/log.db"
        figures["append"] = appends(folder, 50_000)
        figures["appends per second of 1, 2, 4 processes"] = [several(folder, 50_000, k) for k in (1, 2, 4)]
        figures["100 us of work and an append, shipper beside it"] = {how: beside(folder, how, 15) for how in ("none", "thread", "process")}
        figures["idle shipper process, MB"] = shipper_memory(folder)
        figures["ship to SQLite"] = ship(url, folder, rows)
        figures["read from SQLite"] = {how: read(url, how) for how in ("batches", "window")}
        figures["SQLite, bytes a row"] = round(Path(folder, "log.db").stat().st_size / rows)
        if servers.binary("postgres"):
            postgres = servers.Postgres().start()
            try:
                url = postgres.new_database()
                figures["ship to PostgreSQL"] = ship(url, folder, rows)
                figures["read from PostgreSQL"] = {how: read(url, how) for how in ("batches", "window")}
            finally:
                postgres.close()
    common.save("inference_log", figures)


if __name__ == "__main__":
    main()
