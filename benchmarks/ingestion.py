"""Ingestion beside plain readers of the same source (rows a second), and its memory while the input grows tenfold. Files are read at both sizes:
a million rows of Parquet take a fortieth of a second, of which what is done once, whatever the rows, is a part that one can see.

    .venv/bin/python benchmarks/ingestion.py [ROWS]       (default 1,000,000; memory with ten times as many)

Ours twice: read and validated, which is what the readers do and more, and the whole run that also writes Parquet, syncs it and hashes it.
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
from common import machine, save

sys.path.append(str(common.ROOT / "tests"))
import servers  # noqa: E402

WORK = {
    "ours, read and validated": """
from mlops_nb.ingestion.batch import _ahead, _batches, make_plan, prepare
plan = make_plan({"schema": folder + "/schema.yaml"}, "/")
assert sum(prepare(b, plan).table.num_rows for b in _ahead(_batches(config))) == rows
""",
    "ours, stored": """
from mlops_nb.ingestion.batch import ingest_batches
run = ingest_batches({**config, "schema": folder + "/schema.yaml"}, folder + "/out", root="/")
assert run.rows == rows, run
""",
    "polars": """
import polars as pl
frame = pl.read_csv(config["path"]) if kind == "csv" else pl.read_parquet(config["path"])
assert len(frame) == rows
""",
    "pandas": """
import pandas as pd
frame = pd.read_csv(config["path"]) if kind == "csv" else pd.read_parquet(config["path"]) if kind == "parquet" else pd.read_sql_table("sales", config["url"])
assert len(frame) == rows
""",
    "sqlalchemy": """
import sqlalchemy as sa
with sa.create_engine(config["url"]).connect().execution_options(stream_results=True) as c:
    assert sum(len(p) for p in c.execute(sa.text("SELECT * FROM sales")).partitions(20000)) == rows
""",
}
HEAD = """
import json, re, sys, time
kind, rows, folder, config = json.loads(sys.argv[1])
import fsspec, pandas, polars, pyarrow.csv, pyarrow.parquet, sqlalchemy, mlops_nb.ingestion.batch, mlops_nb.validation.checks
import mlops_nb.ingestion.files, mlops_nb.ingestion.database
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024   # ru_maxrss would be the parent's
before, start, cpu = peak(), time.perf_counter(), time.process_time()
"""
TAIL = """
print(json.dumps({"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "mb": peak() - before}))
"""


def store(frame, engine) -> None:
    "A table by pandas"
    frame.to_sql("sales", engine, index=False, chunksize=50_000)


def copy_in(frame, engine) -> None:
    "A table by COPY, since INSERT takes minutes"
    store(frame.head(0), engine)
    with engine.begin() as connection, connection.connection.cursor() as cursor, cursor.copy("COPY sales FROM STDIN (FORMAT csv)") as copy:
        for i in range(0, len(frame), 50_000):
            copy.write(frame.iloc[i:i + 50_000].to_csv(index=False, header=False))


def make(folder: Path, rows: int, urls: dict[str, str]) -> None:
    "The same table as CSV, Parquet and in databases, and its schema"
    import numpy as np
    import pandas as pd
    import sqlalchemy as sa

    from mlops_nb.validation import Schema
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"id": np.arange(rows), "shop": rng.choice(list("ABCDEFGH"), rows), "sold": rng.normal(100, 15, rows).round(3),
                          "pieces": rng.integers(1, 50, rows), "rate": rng.random(rows).round(4), "kind": rng.choice(["cash", "card", "transfer"], rows)})
    frame.to_csv(folder / "sales.csv", index=False)
    frame.to_parquet(folder / "sales.parquet", row_group_size=131_072)
    for kind, url in urls.items():
        (copy_in if kind == "postgresql" else store)(frame, sa.create_engine(url))
    Schema.infer(frame).save(folder / "schema.yaml")


def run(tool: str, kind: str, rows: int, folder: Path, url: str) -> dict:
    "One process: seconds, CPU seconds, and megabytes on top of the imports"
    config = {"type": "file", "path": str(folder / f"sales.{kind}")} if kind in ("csv", "parquet") else {"type": "database", "url": url, "table": "sales"}
    out = subprocess.run([sys.executable, "-c", HEAD + WORK[tool] + TAIL, json.dumps([kind, rows, str(folder), config])], check=True, capture_output=True, text=True)
    return json.loads(out.stdout)


OURS = ["ours, read and validated", "ours, stored"]
READERS = {"csv": ["polars", "pandas"], "parquet": ["polars", "pandas"], "sqlite": ["pandas", "sqlalchemy"], "postgresql": ["pandas", "sqlalchemy"]}


def beside(kind: str, size: tuple) -> dict:
    "The best of three runs of each, in turns"
    tools = OURS + READERS[kind]
    turns = [{t: run(t, kind, *size) for t in tools} for _ in range(3)]
    best = {t: min((turn[t] for turn in turns), key=lambda r: r["seconds"]) for t in tools}
    fastest = min(r["seconds"] for t, r in best.items() if t not in OURS)
    return {"rows_per_second": {t: round(size[0] / r["seconds"]) for t, r in best.items()}, "cpu_seconds": {t: round(r["cpu"], 3) for t, r in best.items()},
            "of_the_fastest": {t: round(fastest / best[t]["seconds"], 3) for t in OURS}}


def measure(kind: str, small: tuple, large: tuple) -> dict:
    "Speed at the small size, of files at the large one too; memory by one run at each"
    memory = {str(at[0]): round(run("ours, stored", kind, *at)["mb"]) for at in (small, large)}
    return {**beside(kind, small), **({"large": beside(kind, large)} if kind in ("csv", "parquet") else {}), "memory_mb": memory}


def main() -> None:
    "Sizes: rows for the speed, and rows for the memory (10 times as many)"
    small = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    figures: dict = {"machine": machine("polars", "pandas", "pyarrow", "sqlalchemy"), "rows": small, "goal": "0.8 of the fastest reader with validation on; memory flat at 10x"}
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        server = servers.Postgres().start() if servers.binary("initdb") else None
        places = [(n, Path(f), {"sqlite": f"sqlite:///{f}/sales.db", **({"postgresql": server.new_database()} if server else {})}) for n, f in ((small, a), (10 * small, b))]
        try:
            for rows, folder, urls in places:
                make(folder, rows, urls)
            for kind in READERS:
                if kind != "postgresql" or server:
                    figures[kind] = measure(kind, *((n, f, urls.get(kind, "")) for n, f, urls in places))
        finally:
            if server:
                server.close()
    figures["when"] = time.strftime("%Y-%m-%d")
    save("ingestion", figures)


if __name__ == "__main__":
    main()
