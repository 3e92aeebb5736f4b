"Ingestion beside plain readers of the same source (rows a second, validation on), and its memory while the input grows tenfold."
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, save

WORK = {
    "ours": """
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
import json, resource, sys, time
kind, rows, folder, config = json.loads(sys.argv[1])
import pandas, polars, pyarrow.csv, pyarrow.parquet, sqlalchemy, mlops_nb.ingestion.batch, mlops_nb.validation.checks
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, start = peak(), time.perf_counter()
"""
TAIL = """
print(json.dumps({"seconds": time.perf_counter() - start, "mb": peak() - before}))
"""


def make(folder: Path, rows: int) -> None:
    "The same table as CSV, Parquet and SQLite, and its schema"
    import numpy as np
    import pandas as pd
    import sqlalchemy as sa

    from mlops_nb.validation import Schema
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"id": np.arange(rows), "shop": rng.choice(list("ABCDEFGH"), rows), "sold": rng.normal(100, 15, rows).round(3),
                          "pieces": rng.integers(1, 50, rows), "rate": rng.random(rows).round(4), "kind": rng.choice(["cash", "card", "transfer"], rows)})
    frame.to_csv(folder / "sales.csv", index=False)
    frame.to_parquet(folder / "sales.parquet", row_group_size=131_072)
    frame.to_sql("sales", sa.create_engine(f"sqlite:///{folder}/sales.db"), index=False, chunksize=50_000)
    Schema.infer(frame).save(folder / "schema.yaml")


def run(tool: str, kind: str, rows: int, folder: Path) -> dict:
    "One process: seconds, and megabytes on top of the imports"
    config = {"type": "database", "url": f"sqlite:///{folder}/sales.db", "table": "sales"} if kind == "database" else {"type": "file", "path": str(folder / f"sales.{kind}")}
    out = subprocess.run([sys.executable, "-c", HEAD + WORK[tool] + TAIL, json.dumps([kind, rows, str(folder), config])], check=True, capture_output=True, text=True)
    return json.loads(out.stdout)


def main() -> None:
    "Best of three at the small size for speed; one run at each size for memory"
    small, large = (int(a) for a in (sys.argv[1:] + ["200000", "2000000"][len(sys.argv) - 1:]))
    figures: dict = {"machine": machine("polars", "pandas", "pyarrow", "sqlalchemy"), "rows": small, "goal": "0.8 of the fastest reader with validation on; memory flat at 10x"}
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        make(Path(a), small)
        make(Path(b), large)
        for kind, tools in {"csv": ["ours", "polars", "pandas"], "parquet": ["ours", "polars", "pandas"], "database": ["ours", "pandas", "sqlalchemy"]}.items():
            seconds = {t: min(run(t, kind, small, Path(a))["seconds"] for _ in range(3)) for t in tools}
            fastest = min(s for t, s in seconds.items() if t != "ours")
            memory = {str(n): round(run("ours", kind, n, f)["mb"]) for n, f in ((small, Path(a)), (large, Path(b)))}
            figures[kind] = {"rows_per_second": {t: round(small / s) for t, s in seconds.items()}, "of_the_fastest": round(fastest / seconds["ours"], 3), "memory_mb": memory}
    figures["when"] = time.strftime("%Y-%m-%d")
    save("ingestion", figures)


if __name__ == "__main__":
    main()
