"""A compiled bundle against its pipeline, loading a bundle against loading by MLflow, our commands against MLflow's; each pair in the same run, in turn.

    make bench-packaging        (or .venv/bin/python benchmarks/bundles.py [ROUNDS], default 9; a file named packaging.py would hide the package of that name)

The gradient boosting pipeline of the serving benchmark (12 numbers, 4 categories). Answers are compared by the CPU time of one thread, which a busy
machine lengthens for both sides alike. Goals: at one row the compiled form answers at least 50 times as fast, as a dict or as a frame; `--help`,
`status` and `audit show` take less than half a second; the registry's commands no longer than MLflow's own. MLflow's command line knows nothing of
registered models: what stands beside ours is its list of the runs behind them. Explanations are of the flights model in artifacts/bundle, which
`make demo` leaves: exact ones by its trees' paths, sampled ones by asking it about mixed rows. Writes benchmarks/results/packaging.json.
"""
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"     # the pipeline's threads would wait for each other, and the waiting be counted
import common
import polars as pl

sys.path[:0] = [str(common.ROOT / "benchmarks/peers")]
import model  # noqa: E402

BIN = Path(sys.executable).parent
LOADS = {"load_bundle": "from mlops_nb.bundle import load_bundle; m = load_bundle(sys.argv[1]); m.program",
         "mlflow.sklearn.load_model": "import mlflow; m = mlflow.sklearn.load_model(sys.argv[2])"}
PROGRAM = """import re, sys, time
start = time.process_time()
{load}
seconds = time.process_time() - start
print(seconds, int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)   # ru_maxrss would be the parent's"""


def answers(fitted, bundle, rounds: int) -> dict:
    "Milliseconds of CPU an answer takes, the median of rounds in which all take turns"
    frame, found = model.table(64)[0], {}
    for n in (1, 32):
        part = frame.head(n)
        rows, polars = part.to_dict("records"), pl.from_pandas(part)
        ways = {"pipeline": lambda part=part: fitted.predict_proba(part), "compiled, frame": lambda part=part: bundle.predict_proba(part),
                "compiled, polars": lambda polars=polars: bundle.predict_proba(polars), "compiled, rows": lambda rows=rows: bundle.predict_rows(rows)}
        times = {w: [] for w in ways}
        for _ in range(rounds):
            for w, ask in ways.items():
                number = 5 if w == "pipeline" else 100
                times[w].append(1000 * timeit.timeit(ask, number=number, timer=time.process_time) / number)
        middle = {w: statistics.median(t) for w, t in times.items()}
        found[f"{n} rows"] = {f"{w}, ms": round(t, 4) for w, t in middle.items()} | {f"pipeline / {w}": round(middle["pipeline"] / t, 1) for w, t in middle.items() if w != "pipeline"}
    return found


def explanations(rounds: int) -> dict:
    "Milliseconds of CPU that it takes to explain an answer of the flights model, exactly and by sampling"
    from mlops_nb.bundle import explain_rows, load_bundle, scales
    bundle = load_bundle(common.ROOT / "artifacts/bundle")
    assert bundle.contributions, "artifacts/bundle is of an older version; run `dvc repro package`"
    row, ways = bundle.input_example, dict(zip((bundle.contributions.method, "sampled"), scales(bundle)))
    times = {way: [] for way in ways}
    for _ in range(rounds):
        for way, scale in ways.items():
            assert explain_rows(bundle, [row], scale)[0].method == way
            times[way].append(200 * timeit.timeit(lambda scale=scale: explain_rows(bundle, [row], scale), number=5, timer=time.process_time))
    return {way: {"scale": ways[way], "cpu_ms": round(statistics.median(t), 3)} for way, t in times.items()} | {"columns": len(row)}


def loads(folder: Path, rounds: int) -> dict:
    "CPU seconds from nothing imported to a model that can answer, and megabytes of the process at its largest"
    seen = {name: [] for name in LOADS}
    for _ in range(rounds):
        for name, load in LOADS.items():
            said = subprocess.run([sys.executable, "-c", PROGRAM.format(load=load), folder / "bundle", folder / "mlflow"], capture_output=True, text=True, check=True).stdout
            seen[name].append([float(x) for x in said.split()[-2:]])
    return {name: {"cpu_s": round(statistics.median(s for s, _ in t), 3), "max_rss_mb": round(statistics.median(m for _, m in t))} for name, t in seen.items()}


def commands(folder: Path, fitted, bundle, rounds: int) -> dict:
    "Seconds of wall clock and of CPU that commands take in a project with five versions"
    from mlops_nb.packaging import package
    from mlops_nb.registry import register
    frame = model.table(200)[0]
    (folder / "params.yaml").write_text("base: {name: m}\n")
    for i in range(5):
        register(package(fitted, folder / f"b{i}", name="m", sample=frame, metadata={"training": {"data": str(i)}}), root=folder)
    env = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/.mlops_nb/mlflow.db"}
    ours = {f"mlops-nb {c}": [BIN / "mlops-nb", *c.split()] for c in ("--help", "status", "audit show", "registry list", "registry show champion", "registry candidates")}
    lines = {**ours, "mlflow runs list": [BIN / "mlflow", "runs", "list", "--experiment-id", "1"], "mlflow experiments search": [BIN / "mlflow", "experiments", "search"]}
    seen = {name: [] for name in lines}
    for _ in range(rounds):
        for name, line in lines.items():
            seen[name].append(_timed(line, folder, env))
    return {name: {"wall_s": round(statistics.median(w for w, _ in t), 2), "cpu_s": round(statistics.median(c for _, c in t), 2)} for name, t in seen.items()}


def _timed(line: list, folder: Path, env: dict) -> tuple[float, float]:
    "Wall clock and CPU seconds of a command, whose status does not matter: `status` says that no platform runs"
    before = os.times()
    subprocess.run([str(x) for x in line], cwd=folder, env=env, capture_output=True, check=False)
    after = os.times()
    return after.elapsed - before.elapsed, after.children_user + after.children_system - before.children_user - before.children_system


def main(rounds: int = 9) -> None:
    "Measure and write"
    import mlflow
    from mlops_nb.packaging import package
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for name in ("MLFLOW_TRACKING_URI", "MLOPS_NB_STATE_URL"):
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="packaging-") as tmp:
        folder, fitted, frame = Path(tmp).resolve(), model.fitted(), model.table()[0]
        bundle = package(fitted, folder / "bundle", name="m", sample=frame)
        assert bundle.compiled, bundle.proof
        mlflow.sklearn.save_model(fitted, str(folder / "mlflow"), input_example=frame.head(2), serialization_format="cloudpickle")
        found = {"answers": answers(fitted, bundle, rounds), "explanations": explanations(rounds), "proof": {k: bundle.proof[k] for k in ("backend", "rows", "difference")},
                 "loading": loads(folder, max(3, rounds // 3)), "commands": commands(folder, fitted, bundle, max(3, rounds // 3))}
    for part in ("answers", "explanations", "loading", "commands"):
        for name, values in found[part].items():
            print(f"{name:28}", values)
    common.save("packaging", {"command": "make bench-packaging", "machine": common.machine("scikit-learn", "pandas", "polars", "onnxruntime", "mlflow", "typer"),
                               "load average": round(os.getloadavg()[0], 1), **found})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
