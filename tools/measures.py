"Make benchmarks/README.md, the measures beside their goals, from benchmarks/results; with --check only say whether it is current."
import json
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = """<!-- Made from benchmarks/results by `make export`. -->

# Measures

What was measured, beside what we wanted, whether reached or not. Peers run in the same run as ours, in environments of their own, on the same data: drift, validation, \
historical features, jobs, monitoring and a bundle's answers and loading by CPU time, the rest by the clock (online reads: the median). A command makes its section again, figures and all; `benchmarks/results/` has more of them than fit here.
"""


def over(table: dict, peer: str, *path: str) -> float:
    "How often ours goes into a peer's figure"
    ours, theirs = table["mlops-nb"], table[peer]
    for key in path:
        ours, theirs = ours[key], theirs[key]
    return theirs / ours


def served(peer: str) -> Callable[[dict], float]: return lambda r: r["ours over, at 16 connections"][peer]
def drifted(peer: str, rows: str) -> Callable[[dict], float]: return lambda r: over(r["results"], peer, rows, "cpu_s")
def checked(peer: str, frame: str, ours: str = "polars") -> Callable[[dict], float]:
    return lambda r: r["results"][peer][frame]["cpu_s"] / r["results"][f"mlops-nb on {ours}"][frame]["cpu_s"]
def online(home: str, entities: int, peer: str) -> Callable[[dict], float]:
    def ratio(r: dict) -> float:
        found = r[f"online, {home}"][f"{entities} entities"]
        ours, theirs = found["ours"]["p50_us"], found[peer]["p50_us"]
        return ours / theirs if peer == "raw" else theirs / ours
    return ratio
def historical(peer: str, what: str, rows: str = "") -> Callable[[dict], float]:
    return lambda r: (found := r[f"historical, 3 views{rows}"])[peer][what] / found["ours"][what]
def gate(what: str) -> Callable[[dict], float]: return lambda r: next(g for g in r["gates"] if g["gate"] == "this library")[what]
def read(source: str) -> Callable[[dict], float]: return lambda r: r[source]["of_the_fastest"]["ours, read and validated"]
def grown(source: str) -> Callable[[dict], float]: return lambda r: r[source]["memory_mb"]["10000000"] / r[source]["memory_mb"]["1000000"]


# part: results, command, rows of what, figure, goal (above it; below it where it is negative), unit
PARTS: dict[str, tuple[str, str, list[tuple[str, Callable[[dict], float], float | None, str]]]] = {
    "Serving, one row as JSON, one worker, 16 connections": ("serving", "make bench-serving", [
        ("requests a second, checked, measured and logged", lambda r: r["servers"]["ours"]["c16"]["per_second"], 1000, ""),
        *((f"against {peer}", served(peer), goal, " times") for peer, goal in {
            "MLflow": 50, "BentoML, batching": 12, "MLServer": 40, "KServe": 40, "FastAPI + ONNX": 1.5, "FastAPI + our compiled model": 1.5,
            "BentoML with ours": 1.5, "MLServer with ours": 1.5, "KServe with ours": 1.5}.items()),
        ("against a bare handler with the same compiled model", served("bare"), .6, " times"),
        ("against hello world on the same server", served("hello"), .2, " times"),
        ("not compiled, against BentoML with batching", served("not compiled / BentoML, batching"), 1, " times"),
        ("p99 at half of the peak", lambda r: r["servers"]["ours"]["half"]["p99_ms"], -10, " ms"),
        ("boot until ready, against importing what it needs", lambda r: r["servers"]["ours"]["boot_s"] / r["bare_import_s"], -1.5, " times"),
        ("memory with the flights model", lambda r: r["servers"]["ours, flights"]["pss_mb"], -130, " MB")]),
    "Rollout": ("rollout", "make bench-rollout", [
        *((f"failed requests in {n} {what}, {where}", lambda r, where=where, key=key: r[where][key]["failed"], -0.0, "")
          for where in ("local", "kubernetes") for n, what, key in ((50, "weight changes", "weight_changes"), (20, "rollouts", "rollouts"))),
        ("a bad canary's first error until it has no traffic, the longest", lambda r: r["local"]["taken_back"]["seconds_max"], -5, " s"),
        ("what the gateway adds at p50", lambda r: r["local"]["gateway"]["gateway_ms"]["p50"] - r["local"]["gateway"]["direct_ms"]["p50"], None, " ms"),
        ("false aborts, the most of all error rates and splits", lambda r: max(v for g in r["gates"] if g["gate"] == "this library"
                                                                              for k, v in g.items() if k.startswith("false")), -.065, ""),
        ("1 % against 3 % errors found", gate("1 to 3 % found, 1:1"), .99, ""),
        ("requests for that, median", gate("requests, median, 1:1"), -700, ""),
        ("requests for that, p90", gate("requests, p90, 1:1"), -1500, "")]),
    "Drift, 20 mixed columns": ("drift", "python benchmarks/drift.py", [
        *((f"against {peer}, {int(rows):,} rows", drifted(peer, rows), goal, " times")
          for peer, goals in {"scipy loop": (6, 6), "evidently": (40, 50), "alibi": (10, 10), "nannyml": (2, 2), "whylogs": (15, None)}.items()
          for rows, goal in zip(("100000", "1000000"), goals)),
        ("against sorting and counting alone, 1,000,000 rows", lambda r: 1 / drifted("limit", "1000000")(r), -2.5, " times"),
        ("two cores against one, wall clock, 1,000,000 rows", lambda r: (t := r["results"])["mlops-nb"]["1000000"]["wall_s"]
         / t["mlops-nb, two cores"]["1000000"]["wall_s"], 1.5, " times"),
        ("memory beyond the input, 1,000,000 rows", lambda r: r["results"]["mlops-nb"]["1000000"]["beyond_mb"], None, " MB"),
        ("Evidently's beyond it", lambda r: r["results"]["evidently"]["1000000"]["beyond_mb"], None, " MB")]),
    "Validation, 58 checks, a million rows": ("validation", "python benchmarks/validation.py", [
        *((f"ours on polars against {peer}, {frame}", checked(peer, frame), goal, " times")
          for peer, goal in {"pandera on polars": 2.5, "great_expectations": 30}.items() for frame in ("clean", "1 % bad", "99 % bad")),
        *((f"both on pandas, against {peer}, {frame}", checked(peer, frame, "pandas"), None, " times")
          for peer in ("pandera on pandas", "great_expectations") for frame in ("clean", "1 % bad", "99 % bad"))]),
    "Features": ("features", "make bench-features", [
        *((f"online, {home}, {n} {'entity' if n == 1 else 'entities'}, p50, against {peer}", online(home, n, peer), goal, " times")
          for home in ("SQLite", "Redis") for n, least in ((1, 3), (100, 10)) for peer, goal in (("Feast", least), ("raw", -2))),
        ("historical, against Feast, 100,000 rows", historical("Feast", "cpu_s", ", 100,000 rows"), 5, " times"),
        ("its memory, against ours", historical("Feast", "peak_mb", ", 100,000 rows"), 4, " times"),
        ("historical, against pandas' merge_asof, a million rows", historical("merge_asof", "cpu_s"), 2, " times")]),
    "Ingestion, a million rows, read and validated": ("ingestion", "make bench-ingestion", [
        line for source in ("csv", "parquet", "sqlite", "postgresql")
        for line in ((f"{source}, against the fastest that only reads", read(source), .8, " times"),
                     *([(f"{source}, the same at ten million rows", lambda r, source=source: read(source)({source: r[source]["large"]}), .8, " times")]
                       if source in ("csv", "parquet") else []),
                     (f"{source}, memory at ten times the rows", grown(source), -1.5, " times"))]),
    "Packaging": ("packaging", "make bench-packaging", [
        ("one row as a dictionary, against the pipeline", lambda r: r["answers"]["1 rows"]["pipeline / compiled, rows"], 50, " times"),
        ("one row as a frame of pandas, against the pipeline", lambda r: r["answers"]["1 rows"]["pipeline / compiled, frame"], 50, " times"),
        ("one row as a frame of polars, against the pipeline", lambda r: r["answers"]["1 rows"]["pipeline / compiled, polars"], 50, " times"),
        ("largest difference from the pipeline", lambda r: r["proof"]["difference"], -1e-6, ""),
        ("CPU of an exact explanation of the flights model, by its trees' paths", lambda r: r["explanations"]["tree"]["cpu_ms"], None, " ms"),
        ("the same by sampling, on the scale of the probability", lambda r: r["explanations"]["sampled"]["cpu_ms"], None, " ms"),
        ("loading, against mlflow.sklearn.load_model", lambda r: r["loading"]["mlflow.sklearn.load_model"]["cpu_s"] / r["loading"]["load_bundle"]["cpu_s"],
         None, " times"),
        *((f"`mlops-nb {c}`", lambda r, c=c: r["commands"][f"mlops-nb {c}"]["wall_s"], -.5, " s") for c in ("--help", "status", "audit show")),
        ("`mlops-nb registry list`, against `mlflow runs list`", lambda r: r["commands"]["mlops-nb registry list"]["wall_s"]
         / r["commands"]["mlflow runs list"]["wall_s"], -1, " times")]),
    "Monitoring, a million predictions of 20 features": ("monitoring", "make bench-monitoring", [
        ("CPU", lambda r: r["monitor, Parquet in batches"]["cpu_s"], -10, " s"),
        ("memory", lambda r: r["monitor, Parquet in batches"]["peak_mb"], -1500, " MB"),
        ("against Evidently's preset, the same rows", lambda r: r["the same rows by both"]["times_ours"], 20, " times")]),
    "Jobs": ("jobs", "make bench-jobs", [("a job over papermill alone", lambda r: r["overhead"]["cpu_s"], -1, " s")]),
    "Pipeline": ("pipeline", "make bench-pipeline", [("`dvc repro` with nothing to do, against an empty DVC project", lambda r: r["ratio"], None, " times")]),
}


def once_and_each(source: str, tool: str) -> Callable[[dict], str]:
    "CPU milliseconds that reading costs once, and for each million rows: the line through both sizes"
    def told(r: dict) -> str:
        small, large = (1000 * part["cpu_seconds"][tool] for part in (r[source], r[source]["large"]))
        each = (large - small) / 9
        return f"{max(0, small - each):.0f} ms once and {each:.0f} ms a million rows"
    return told


# part: where the time goes, for goals that are missed
NOTES: dict[str, Callable[[dict], str]] = {
    "Ingestion, a million rows, read and validated": lambda r: "By CPU time at one and at ten million rows: " + "; ".join(
        f"{source}, {', '.join(f'{name} {once_and_each(source, tool)(r)}' for name, tool in (('ours', 'ours, read and validated'), (peer, peer)))}"
        for source, peer in (("parquet", "polars"), ("csv", "pandas"))) + ". What is done once (the schema, compiling its checks, the first touch of memory) shows at a million rows."}


def figure(value: float, unit: str) -> str:
    "Three digits of a number, and its unit"
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text}{unit}"


def line(what: str, value: float, goal: float | None, unit: str) -> str:
    "One row: what was measured, the figure, the goal, whether it is reached"
    if goal is None: return f"| {what} | {figure(value, unit)} | | |"
    most = str(goal).startswith("-")
    reached = value <= -goal if most else value >= goal
    return f"| {what} | {figure(value, unit)} | {'at most' if most else 'at least'} {figure(abs(goal), unit)} | {'yes' if reached else '**no**'} |"


def section(part: str, name: str, command: str, rows: list) -> str:
    "A part of the page"
    found = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    machine = ", ".join(f"{k} {v}" for k, v in found["machine"].items() if k not in ("cpu", "cores", "python"))
    told = f"`{command}` on {found['machine']['cores']} cores of {found['machine']['cpu']}, Python {found['machine']['python']}" + (f", {machine}" if machine else "")
    table = [line(what, get(found), goal, unit) for what, get, goal, unit in rows]
    plots = [f"\n![]({p.relative_to(ROOT / 'benchmarks')})" for p in sorted((ROOT / "benchmarks/results").glob(f"{name}*.png"))]
    notes = [f"\n{NOTES[part](found)}"] if part in NOTES else []
    return "\n".join([f"## {part}\n", told + ".\n", "| | measured | wanted | reached |", "|---|---:|---:|---|", *table, *notes, *plots])


def render() -> str:
    "The page"
    return HEAD + "\n" + "\n\n".join(section(part, *rest) for part, rest in PARTS.items()) + "\n"


if __name__ == "__main__":
    page = ROOT / "benchmarks/README.md"
    if "--check" not in sys.argv:
        page.write_text(render())
    elif page.read_text() != render():
        sys.exit("benchmarks/README.md is not what benchmarks/results gives: run `make export`")
