"""Drift against scipy, Evidently, alibi-detect, NannyML and whylogs: 20 mixed columns, the same data, CPU time of a warm call, and the limit.

    .venv/bin/python benchmarks/drift.py [ROWS ...]          # 100000 and 1000000 when none is given; Evidently takes minutes at a million

Data: 14 numbers (normal, heavy tails, integers, zeros, missing) and 6 categories of 2 to 500 levels, one reference and one current frame. One core unless
a row says two: the process is bound to it. Up to 200,000 rows the best of three processes counts, since one differs from the next by a third. `mlops-nb` scores against a saved reference with its sorted values; the row with fit counts both sides.
The limit is a sort of the numeric columns and Arrow's counts of the categories: nothing that looks at every value can be faster by much.
Peers live in environments of their own (tools/peers.py). Writes benchmarks/results/drift.json, drift.md and drift.png.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

LEVELS = (2, 5, 20, 50, 100, 500)
PEERS = {"whylogs": "whylogs", "evidently": "evidently", "alibi": "alibi-detect", "nannyml": "nannyml"}


def table(rows: int, seed: int, columns: int = 20) -> pd.DataFrame:
    "Mixed columns, in the proportion of 14 numbers to 6 categories"
    rng, data = np.random.default_rng(seed), {}
    number = [lambda: rng.normal(size=rows), lambda: rng.standard_t(1.5, rows), lambda: rng.integers(0, 50, rows), lambda: rng.lognormal(3, 1, rows).round(2),
              lambda: rng.exponential(size=rows) * (rng.random(rows) > 0.7), lambda: np.where(rng.random(rows) < 0.1, np.nan, rng.normal(size=rows))]
    for i in range(columns):
        k = LEVELS[i // 3 % 6]
        data[f"c{i}"] = np.array([f"level{j}" for j in range(k)])[rng.integers(0, k, rows)] if i % 20 % 3 == 2 else number[i % 6]()
    return pd.DataFrame(data)


def split(frame: pd.DataFrame) -> tuple[list[str], list[str]]:
    "Numeric and other columns"
    numbers = list(frame.select_dtypes("number"))
    return numbers, [c for c in frame if c not in numbers]


def ours(a, b, workers=1):
    "Score against a fitted reference"
    from mlops_nb.drift import Reference, detect_drift
    reference = Reference.fit(a, values=True)
    return lambda: detect_drift(reference, b, workers=workers)


def ours_counts(a, b):
    "Score against a reference without values: Kolmogorov-Smirnov within bounds"
    from mlops_nb.drift import Reference, detect_drift
    reference = Reference.fit(a)
    return lambda: detect_drift(reference, b, workers=1)


def ours_fit(a, b):
    "Both frames, with the counting of the reference"
    from mlops_nb.drift import detect_drift
    return lambda: detect_drift(a, b, workers=1)


def limit(a, b):
    "What any exact method must do to the current frame: by the faster of two sorts, else it would be no limit on a Zen 4"
    import pyarrow as pa
    import pyarrow.compute as pc
    from mlops_nb.drift.columns import sort_numbers
    numbers, others = split(b)
    arrays, texts = [b[c].to_numpy() for c in numbers], [pa.array(b[c]) for c in others]
    return lambda: ([sort_numbers(v) for v in arrays], [pc.value_counts(t) for t in texts])


def scipy_loop(a, b):
    "Kolmogorov-Smirnov, chi-square, decile PSI and JS as one writes them"
    from scipy import stats
    from scipy.spatial.distance import jensenshannon
    numbers, others = split(a)
    def call():
        for c in numbers:
            x, y = a[c].dropna().to_numpy(), b[c].dropna().to_numpy()
            stats.ks_2samp(x, y, method="asymp")
            edges = np.r_[-np.inf, np.unique(np.quantile(x, np.arange(1, 10) / 10)), np.inf]
            p, q = (np.histogram(v, edges)[0] / len(v) + 1e-6 for v in (x, y))
            np.sum((q - p) * np.log(q / p)), jensenshannon(p, q, base=2)
        for c in others:
            both = pd.concat([a[c].value_counts(), b[c].value_counts()], axis=1).fillna(0).to_numpy()
            stats.chi2_contingency(both.T, correction=False)
            p, q = (both / both.sum(0) + 1e-6).T
            np.sum((q - p) * np.log(q / p)), jensenshannon(p, q, base=2)
    return call


def evidently(a, b):
    "The data-drift preset, default tests"
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset
    numbers, others = split(a)
    definition = DataDefinition(numerical_columns=numbers, categorical_columns=others)
    left, right = (Dataset.from_pandas(f, definition) for f in (a, b))
    return lambda: Report([DataDriftPreset()]).run(right, left).dict()


def alibi(a, b):
    "TabularDrift on a float matrix, fitted and scored"
    from alibi_detect.cd import TabularDrift
    numbers, others = split(a)
    codes = {c: pd.Index(sorted(set(a[c]) | set(b[c]))) for c in others}
    x, y = (np.column_stack([codes[c].get_indexer(f[c]) if c in codes else f[c].fillna(0) for c in a]).astype(np.float32) for f in (a, b))
    detector = TabularDrift(x, p_val=0.05, categories_per_feature={i: None for i, c in enumerate(a) if c in codes})
    return lambda: detector.predict(y)


def nannyml(a, b):
    "Univariate Kolmogorov-Smirnov and chi-square in one chunk"
    import nannyml as nml
    def call():
        made = nml.UnivariateDriftCalculator(column_names=list(a), continuous_methods=["kolmogorov_smirnov"], categorical_methods=["chi2"], chunk_number=1)
        return made.fit(a).calculate(b).to_df()
    return call


def whylogs(a, b):
    "Profile the current frame and compare with the reference's profile"
    import whylogs as why
    from whylogs.viz.drift.column_drift_algorithms import calculate_drift_scores
    reference = why.log(a).profile().view()
    return lambda: calculate_drift_scores(why.log(b).profile().view(), reference, with_thresholds=True)


TOOLS = {"limit": limit, "mlops-nb": ours, "mlops-nb, counts only": ours_counts, "mlops-nb, with fit": ours_fit, "mlops-nb, two cores": lambda a, b: ours(a, b, 2),
         "scipy loop": scipy_loop, "nannyml": nannyml, "alibi": alibi, "whylogs": whylogs, "evidently": evidently}


def peak_kb() -> int:
    "Peak memory of this program alone: getrusage would carry over that of the process which started it"
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))


def worker(tool: str, path: str, rounds: int) -> None:
    "Time warm calls of one tool on one pair of files"
    if "two" not in tool and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    call = TOOLS[tool](*(pd.read_parquet(f"{path}/{side}.parquet") for side in "ab"))
    before = peak_kb()
    if rounds > 1:
        call()
    cpu, wall = [], []
    for _ in range(rounds):
        start, begin = time.process_time(), time.perf_counter()
        call()
        cpu.append(time.process_time() - start)
        wall.append(time.perf_counter() - begin)
    peak = peak_kb()
    print(json.dumps({"cpu_s": round(statistics.median(cpu), 4), "wall_s": round(statistics.median(wall), 4), "peak_mb": peak // 1024, "beyond_mb": (peak - before) // 1024}))


def peer(tool: str) -> str:
    "The Python that has a tool"
    if tool not in PEERS:
        return sys.executable
    import common  # noqa: F401  makes tools/ importable
    from peers import python_of
    return python_of(tool)


def measure(tool: str, rows: int, columns: int = 20, rounds: int = 5) -> dict:
    "One tool on one size, in a process of its own"
    env = {**os.environ, **{k: "1" for k in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS", "NML_DISABLE_USAGE_LOGGING", "DO_NOT_TRACK")}, "WHYLOGS_NO_ANALYTICS": "True"}
    with tempfile.TemporaryDirectory() as tmp:
        for seed, side in enumerate("ab"):
            table(rows, seed, columns).to_parquet(f"{tmp}/{side}.parquet")
        done = subprocess.run([peer(tool), "-W", "ignore", __file__, "--worker", tool, tmp, str(rounds)], env=env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else {"failed": (done.stderr.splitlines() or ["no output"])[-1][:200]}


def version_of(tool: str) -> str:
    "The version of a peer"
    return subprocess.run([peer(tool), "-c", f"import importlib.metadata as m; print(m.version('{PEERS[tool]}'))"], capture_output=True, text=True).stdout.strip()


def plot(figures: dict, path: Path) -> None:
    "Left, CPU seconds of all tools; right, ours against rows and against columns, where straight lines are proportional"
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    sizes = list(next(iter(figures["results"].values())))
    for i, rows in enumerate(sizes):
        told = {t: r[rows]["cpu_s"] for t, r in figures["results"].items() if "cpu_s" in r[rows]}
        left.barh(np.arange(len(told)) + 0.4 * i - 0.2, list(told.values()), 0.4, label=f"{int(rows):,} rows")
        left.set_yticks(range(len(told)), list(told))
    left.set(xscale="log", xlabel="CPU seconds, 20 columns", title="one reference, one current frame")
    left.invert_yaxis()
    left.legend(fontsize=8)
    points = [(*map(int, name.split(" x ")), r["cpu_s"]) for name, r in figures["scale"].items() if "cpu_s" in r]
    for label, chosen in (("rows, at 20 columns", sorted((n, s) for n, c, s in points if c == 20)), ("columns, at 10,000 rows", sorted((c, s) for n, c, s in points if n == 10_000))):
        right.plot(*zip(*chosen), "o-", label=label)
    right.set(xscale="log", yscale="log", xlabel="number of", ylabel="CPU seconds", title="mlops-nb")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(sizes: list[int], tools: list[str]) -> None:
    "Measure all and write"
    from common import ROOT, machine, save
    results, scale = {}, {}
    for rows in sizes:
        for tool in tools:
            slow = tool in ("evidently", "alibi", "whylogs", "scipy loop", "nannyml")
            tried = [measure(tool, rows, rounds=1 if slow and rows > 200_000 or tool == "evidently" else 5) for _ in range(3 if rows <= 200_000 else 1)]
            results.setdefault(tool, {})[str(rows)] = min(tried, key=lambda r: r.get("cpu_s", float("inf")))
            print(rows, tool, results[tool][str(rows)], flush=True)
        best = results["mlops-nb"][str(rows)]
        for r in results.values():
            if "cpu_s" in r[str(rows)]:
                r[str(rows)]["times_ours"] = round(r[str(rows)]["cpu_s"] / best["cpu_s"], 2)
    for rows, columns in ((10_000, 20), (100_000, 20), (1_000_000, 20), (10_000_000, 20), (10_000, 10), (10_000, 100), (10_000, 1000)):
        scale[f"{rows} x {columns}"] = measure("mlops-nb", rows, columns, 3)
        print(rows, columns, scale[f"{rows} x {columns}"], flush=True)
    figures = {"command": f"python benchmarks/drift.py {' '.join(map(str, sizes))}", "machine": {**machine("numpy", "pandas", "pyarrow", "scipy"),
               **{t: version_of(t) for t in tools if t in PEERS}}, "columns": 20, "results": results, "scale": scale}
    save("drift", figures)
    lines = ["| tool | " + " | ".join(f"{n:,} rows, CPU s | times ours | MB beyond input" for n in sizes) + " |", "|---" * (1 + 3 * len(sizes)) + "|"]
    for tool, r in results.items():
        lines.append(f"| {tool} | " + " | ".join(f"{r[str(n)].get('cpu_s', 'failed')} | {r[str(n)].get('times_ours', '')} | {r[str(n)].get('beyond_mb', '')}" for n in sizes) + " |")
    (ROOT / "benchmarks/results/drift.md").write_text("\n".join(lines) + "\n")
    plot(figures, ROOT / "benchmarks/results/drift.png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main([int(a) for a in sys.argv[1:]] or [100_000, 1_000_000], list(TOOLS))
