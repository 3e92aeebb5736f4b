"""Monitoring: a million logged predictions with 20 features, from batches as the log gives them; CPU seconds and the memory it needed.

    .venv/bin/python benchmarks/monitoring.py [ROWS]         # also --log: from a SQLite log of a fifth of the rows; --evidently: the same rows by Evidently too, some minutes

The window is Parquet, read as Arrow batches of 20,000 rows: 14 numbers, 6 categories of 2 to 500 levels, half of the rows with their label. All parts run:
metrics with intervals, drift of features, answers and labels, quality with edge cases, system, business, feedback. Writes benchmarks/results/monitoring.json.
Evidently has the same frame in memory, in an environment of its own (tools/peers.py): its presets for drift, data summary and classification. It has no intervals,
no edge cases, no estimates without labels and no decision, and reads no log; ours has them, and reads its window from Parquet within the time. The time is that
of the work: what both import of other libraries (Evidently at once, we when it is needed) is imported before.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import numpy as np
import pandas as pd
from drift import table

RUN = """if True:
    import json, sys, time
    sys.path.insert(0, sys.argv[3])
    import pandas, polars, river.drift, scipy.stats, pyarrow.parquet as pq
    from mlops_nb.drift import Reference
    from mlops_nb.monitoring import Monitor, monitor
    from mlops_nb.monitoring.policy import Measure
    peak = lambda: next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    reference = Reference.load(sys.argv[2])
    before, cpu, start = peak(), time.process_time(), time.perf_counter()
    window = pq.ParquetFile(sys.argv[1], pre_buffer=False).iter_batches(20_000)
    options = Monitor(slices=["c2"], business=[Measure(name="cost", value="c0", where="prediction != feedback", how="sum")])
    report = monitor(iter(window), root="nowhere", reference=reference, classes=[False, True], metrics={"roc_auc": {"value": .7}, "accuracy": {"value": .7}}, options=options)
    report.save_html(sys.argv[1] + ".html")
    assert not report.failed, report.parts
    print(json.dumps({"rows": report.window["rows"], "cpu_s": round(time.process_time() - cpu, 2), "wall_s": round(time.perf_counter() - start, 2), "peak_mb": round(peak()), "added_mb": round(peak() - before)}))"""

LOG = """if True:
    import json, sys, time
    from mlops_nb.drift import Reference
    from mlops_nb.monitoring import Subject, monitor
    peak = lambda: next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    cpu = time.process_time()
    report = monitor(log=sys.argv[1], root="nowhere", model=Subject("m", reference=Reference.load(sys.argv[2]), classes=[False, True]))
    assert not report.failed, report.parts
    print(json.dumps({"rows": report.window["rows"], "cpu_s": round(time.process_time() - cpu, 2), "peak_mb": round(peak())}))"""

EVIDENTLY = """if True:
    import json, sys, time
    import pandas as pd
    from evidently import BinaryClassification, DataDefinition, Dataset, Report
    from evidently.presets import ClassificationPreset, DataDriftPreset, DataSummaryPreset
    peak = lambda: next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    frames = [pd.read_parquet(path) for path in sys.argv[1:]]
    names = [c for c in frames[0] if c[0] == "c" and c != "caller"]
    for f in frames: f["label"], f["answer"] = f["feedback"].astype(object).map({True: 1.0, False: 0.0}).astype(float), f["prediction"].astype(int)
    numbers = [c for c in names if pd.api.types.is_numeric_dtype(frames[0][c])] + ["score"]
    made = lambda frame, label: Dataset.from_pandas(frame, DataDefinition(numerical_columns=numbers, categorical_columns=[c for c in names if c not in numbers] + ["answer"],
        classification=[BinaryClassification(target="label", prediction_labels="answer", prediction_probas="score", pos_label=1)] if label else None))
    keep = [*names, "score", "answer"]
    before, cpu, start = peak(), time.process_time(), time.perf_counter()
    said = Report([DataDriftPreset(), DataSummaryPreset()]).run(made(frames[1][keep], False), made(frames[0][keep], False))
    right = [f.loc[f["label"].notna(), [*keep, "label"]].astype({"label": int}) for f in frames]
    told = Report([ClassificationPreset()]).run(made(right[1], True), made(right[0], True))
    said.save_html(sys.argv[1] + ".1.html"); told.save_html(sys.argv[1] + ".2.html")
    print(json.dumps({"rows": len(frames[1]), "cpu_s": round(time.process_time() - cpu, 2), "wall_s": round(time.perf_counter() - start, 2), "peak_mb": round(peak()), "added_mb": round(peak() - before)}))"""


def window(rows: int, seed: int) -> pd.DataFrame:
    "Rows of a log"
    frame, rng = table(rows, seed), np.random.default_rng(seed)
    score = 1 / (1 + np.exp(-frame["c0"].to_numpy()))
    late = pd.array(rng.random(rows) < score, dtype="boolean")
    late[rng.random(rows) < .5] = pd.NA
    return frame.assign(prediction_id=[f"{i:032x}" for i in range(rows)], time=pd.date_range("2013-04-01", periods=rows, freq="s", tz="UTC"), model_name="m", model_version="", prediction=score > .5, score=score,
                        latency_ms=rng.lognormal(0, 1, rows), feedback=late, request_id=[f"r{i}" for i in range(rows)], row=0, caller=rng.choice(["ann", "bob"], rows), weight=1.)


def run(code: str, *words: str, python: str = sys.executable) -> dict:
    "A measurement in a process of its own"
    return json.loads(subprocess.run([python, "-W", "ignore", "-c", code, *words], capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def from_log(folder: Path, frame: pd.DataFrame, reference: str) -> dict:
    "The same from a SQLite log, whose features are JSON"
    from mlops_nb.inference_log import Batch, InferenceLog, Prediction
    url, names = f"sqlite:///{folder}/log.db", [c for c in frame if c.startswith("c") and c != "caller"]
    log, features = InferenceLog(url), frame[names].astype(object).where(frame[names].notna(), None).to_dict("records")
    made = [Prediction(r.prediction_id, "m", "", bool(r.prediction), f, r.score, r.latency_ms, r.request_id, time=r.time.timestamp()) for r, f in zip(frame.itertuples(), features)]
    for i in range(0, len(made), 20_000):
        log.write([Batch(0., 0., made[i:i + 20_000])])
    return run(LOG, url, reference)


def beside_evidently(folder: Path, train: pd.DataFrame, frame: pd.DataFrame, reference: str) -> dict:
    "Both on the same rows"
    from peers import python_of
    for name, part in (("train", train.head(len(frame))), ("part", frame)):
        part.to_parquet(folder / f"{name}.parquet", index=False)
    told = {"mlops-nb": run(RUN, f"{folder}/part.parquet", reference, str(common.ROOT)), "evidently": run(EVIDENTLY, f"{folder}/train.parquet", f"{folder}/part.parquet", python=python_of("evidently"))}
    return {**told, "times_ours": round(told["evidently"]["cpu_s"] / told["mlops-nb"]["cpu_s"], 1)}


def main() -> None:
    words = [w for w in sys.argv[1:] if not w.startswith("--")]
    rows = int(words[0]) if words else 1_000_000
    figures = {"machine": common.machine("numpy", "pandas", "pyarrow", "polars")}
    from mlops_nb.drift import Reference
    with tempfile.TemporaryDirectory() as tmp:
        train, reference = window(200_000, 1), f"{tmp}/reference.json"
        names = [c for c in train if c.startswith("c") and c != "caller"]
        Reference.fit(train[[*names, "prediction", "score"]].assign(target=train["feedback"].fillna(False).astype(bool))).save(reference)
        frame = window(rows, 2)
        frame.to_parquet(f"{tmp}/window.parquet", index=False)
        figures["monitor, Parquet in batches"] = run(RUN, f"{tmp}/window.parquet", reference, str(common.ROOT))
        figures["page, KB"] = round(Path(f"{tmp}/window.parquet.html").stat().st_size / 1024)
        if "--log" in sys.argv:
            figures["monitor, SQLite log"] = from_log(Path(tmp), frame.head(rows // 5), reference)
        if "--evidently" in sys.argv:
            figures["the same rows by both"] = beside_evidently(Path(tmp), train, frame, reference)
    common.save("monitoring", figures)


if __name__ == "__main__":
    main()
