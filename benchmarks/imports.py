"""Time `from mlops_nb.MODULE import …` against `import numpy, pandas, polars, scipy.stats`, each in a new process, in turn.

    .venv/bin/python benchmarks/imports.py

CPU time, median of the rounds; writes benchmarks/results/imports.json. The goal: at most 1.2 times.
"""
import statistics
import sys

from common import ROOT, machine, save, timed

# Packages import their parts when a name is asked for, so each line asks for what a user would
NAMES = {"core": "load_params", "audit": "append", "report": "page", "drift": "Reference, detect_drift", "validation": "Schema, validate",
         "features": "add_history, model_input", "features.encoders": "make_preprocessor", "evaluation": "evaluate", "bundle": "load_bundle"}


def main(rounds: int = 11) -> None:
    "Measure and write"
    lines = {"base": "import numpy, pandas, polars, scipy.stats", **{m: f"from mlops_nb.{m} import {names}" for m, names in NAMES.items()}}
    cpu = {name: [] for name in lines}
    for _ in range(rounds):
        for name, line in lines.items():
            cpu[name].append(timed(sys.executable, "-c", line, cwd=ROOT)[1])
    base = statistics.median(cpu["base"])
    modules = {m: {"cpu_s": round(statistics.median(cpu[m]), 3), "ratio": round(statistics.median(cpu[m]) / base, 2)} for m in NAMES}
    save("imports", {"command": "python benchmarks/imports.py", "machine": machine("numpy", "pandas", "polars", "scipy", "scikit-learn"), "base_cpu_s": round(base, 3), "modules": modules})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 11)
