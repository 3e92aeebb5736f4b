"""Time `mlops-nb job run` against plain `papermill` on the same tiny notebook, each in a new process, in turn.

    .venv/bin/python benchmarks/jobs.py

Wall and CPU time, median of the rounds; writes benchmarks/results/jobs.json. The goal: less than a second more.
"""
import statistics
import sys
import tempfile
from pathlib import Path

import nbformat
from common import machine, save, timed


def project(root: Path) -> None:
    "A folder with one job that does next to nothing"
    made = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    made.cells = [nbformat.v4.new_markdown_cell("# A job"), nbformat.v4.new_code_cell('number = 0\nout = ""', metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell("number + 1")]
    (root / "jobs").mkdir()
    nbformat.write(made, root / "jobs/tiny.ipynb")
    (root / "params.yaml").write_text("base: {name: tiny}\n")


def main(rounds: int = 7) -> None:
    "Measure and write"
    lines = {"papermill": lambda n: ["-m", "papermill", "jobs/tiny.ipynb", f"plain{n}.ipynb", "-p", "number", str(n), "-k", "python3"],
             "job": lambda n: ["-c", "from mlops_nb.cli import main; main()", "job", "run", "tiny", "-p", f"number={n}"],
             "done already": lambda n: ["-c", "from mlops_nb.cli import main; main()", "job", "run", "tiny", "-p", f"number={n}"]}
    found = {name: [] for name in lines}
    with tempfile.TemporaryDirectory() as folder:
        project(Path(folder))
        for n in range(1, rounds + 1):
            for name, words in lines.items():
                found[name].append(timed(sys.executable, *words(n), cwd=folder))
    told = {name: {"wall_s": round(statistics.median(w for w, _ in times), 2), "cpu_s": round(statistics.median(c for _, c in times), 2)} for name, times in found.items()}
    save("jobs", {"command": "python benchmarks/jobs.py", "machine": machine("papermill", "nbconvert", "ipykernel"), "rounds": rounds, **told,
                  "overhead": {k: round(told["job"][k] - told["papermill"][k], 2) for k in ("wall_s", "cpu_s")}})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
