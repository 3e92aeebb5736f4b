"""Validation against pandera and Great Expectations: 58 checks of 20 columns, the same data, one core, CPU time of a warm call, the best of three turns.

    .venv/bin/python benchmarks/validation.py [ROWS]

The peers live in an environment of their own (tools/peers.py). Data: clean, 1 % of rows bad in three columns,
99 % of rows bad in three columns. Every tool must find the same verdict. Writes benchmarks/results/validation.json.
"""
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
import pandas as pd

NUMBERS, LEVELS = [f"n{i:02}" for i in range(14)], [f"c{i}" for i in range(6)]
STATES = {"clean": 0.0, "1 % bad": 0.01, "99 % bad": 0.99}
TURNS, ROUNDS = 3, 5


def table(rows: int, bad: float) -> pd.DataFrame:
    "14 numbers, the first unique, and 6 categories of 12 levels; in `n01` and `n02` and `c0` a share of the values is out of bounds"
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({n: rng.normal(size=rows) for n in NUMBERS})
    frame["n00"] = rng.permutation(rows).astype(float)
    for c in LEVELS:
        frame[c] = rng.choice([f"level{i}" for i in range(12)], rows)
    if bad:
        for c, value in {"n01": 99.0, "n02": -99.0, "c0": "strange"}.items():
            frame.loc[rng.random(rows) < bad, c] = value
    return frame


def bounds(column: str, rows: int) -> tuple[float, float]:
    "What a number may be"
    return (0.0, float(rows)) if column == "n00" else (-20.0, 20.0)


def ours(frame: pd.DataFrame, backend: str):
    "20 types, 17 not-null, 14 ranges, 6 sets, 1 unique"
    import polars as pl
    from mlops_nb.validation import Schema, validate
    def column(name: str, k: int) -> dict:
        checks = [{"check": "not_null"}] if k < 17 else []
        if name in NUMBERS:
            low, high = bounds(name, len(frame))
            checks.append({"check": "range", "min": low, "max": high})
        else:
            checks.append({"check": "allowed", "values": [f"level{i}" for i in range(12)]})
        if name == "n00":
            checks.append({"check": "unique"})
        return {"kind": "number" if name in NUMBERS else "category", "checks": checks}
    schema = Schema(columns={n: column(n, k) for k, n in enumerate(frame.columns)})
    data = pl.from_pandas(frame) if backend == "polars" else frame
    return lambda: validate(data, schema).passed


def pandera(frame: pd.DataFrame, backend: str):
    "The same in pandera, lazily so that all failures are found"
    if backend == "polars":
        import pandera.polars as pa
        import polars as pl
        data, number, text = pl.from_pandas(frame), pl.Float64, pl.String
    else:
        import pandera.pandas as pa
        data, number, text = frame, float, frame["c0"].dtype
    def column(name: str, k: int):
        check = pa.Check.in_range(*bounds(name, len(frame))) if name in NUMBERS else pa.Check.isin([f"level{i}" for i in range(12)])
        return pa.Column(number if name in NUMBERS else text, check, nullable=k >= 17, unique=name == "n00")
    schema = pa.DataFrameSchema({n: column(n, k) for k, n in enumerate(frame.columns)})
    def call() -> bool:
        try:
            schema.validate(data, lazy=True)
            return True
        except (pa.errors.SchemaErrors, pa.errors.SchemaError):
            return False
    return call


def great_expectations(frame: pd.DataFrame):
    "The same as a suite of expectations"
    import great_expectations as gx
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    asset = context.data_sources.add_pandas("d").add_dataframe_asset("a").add_batch_definition_whole_dataframe("b")
    e, suite = gx.expectations, gx.ExpectationSuite("s")
    for k, name in enumerate(frame.columns):
        suite.add_expectation(e.ExpectColumnValuesToBeOfType(column=name, type_="float64" if name in NUMBERS else "str"))
        if k < 17:
            suite.add_expectation(e.ExpectColumnValuesToNotBeNull(column=name))
        if name in NUMBERS:
            low, high = bounds(name, len(frame))
            suite.add_expectation(e.ExpectColumnValuesToBeBetween(column=name, min_value=low, max_value=high))
        else:
            suite.add_expectation(e.ExpectColumnValuesToBeInSet(column=name, value_set=[f"level{i}" for i in range(12)]))
        if name == "n00":
            suite.add_expectation(e.ExpectColumnValuesToBeUnique(column=name))
    batch = asset.get_batch({"dataframe": frame})
    return lambda: bool(batch.validate(suite).success)


TOOLS = {"mlops-nb on pandas": lambda f: ours(f, "pandas"), "mlops-nb on polars": lambda f: ours(f, "polars"), "pandera on pandas": lambda f: pandera(f, "pandas"), "pandera on polars": lambda f: pandera(f, "polars"), "great_expectations": great_expectations}


def worker(tool: str, path: str, rounds: int) -> None:
    "Time warm calls of one tool on one file"
    call = TOOLS[tool](pd.read_parquet(path))
    before, verdict, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, call(), []
    for _ in range(rounds):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    print(json.dumps({"cpu_s": round(min(seconds), 4), "passed": verdict, "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024), "before_mb": round(before / 1024)}))


def main(rows: int) -> None:
    "Measure all and write"
    from common import machine, save
    from peers import python_of
    one = {**os.environ, "POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1", "GX_ANALYTICS_ENABLED": "false"}
    other, results = python_of("validation"), {}
    with tempfile.TemporaryDirectory() as tmp:
        for state, bad in STATES.items():
            file = f"{tmp}/data.parquet"
            table(rows, bad).to_parquet(file)
            for tool in list(TOOLS) * TURNS:    # in turn, so that no tool has the machine's bad minute for itself
                python = sys.executable if tool.startswith("mlops-nb") else other
                rounds = "1" if tool == "great_expectations" else str(ROUNDS)
                out = subprocess.run([python, "-W", "ignore", __file__, "--worker", tool, file, rounds], env=one, capture_output=True, text=True, check=True).stdout
                best = results.setdefault(tool, {})
                best[state] = min(json.loads(out.splitlines()[-1]), best.get(state, {"cpu_s": float("inf")}), key=lambda r: r["cpu_s"])
    for state, bad in STATES.items():
        assert {r[state]["passed"] for r in results.values()} == {not bad}, state
        for tool, r in results.items():
            same = results["mlops-nb on polars" if tool.endswith("polars") else "mlops-nb on pandas"]
            r[state]["times_ours"] = round(r[state]["cpu_s"] / same[state]["cpu_s"], 1)
    versions = json.loads(subprocess.run([other, "-c", "import json, importlib.metadata as m; print(json.dumps({p: m.version(p) for p in ('pandera', 'great_expectations')}))"],
                                         capture_output=True, text=True, check=True).stdout)
    save("validation", {"command": f"python benchmarks/validation.py {rows}", "machine": {**machine("polars", "pandas"), **versions}, "rows": rows, "checks": 58, "results": results})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
