"""Time the pipeline: from nothing, and with nothing to do against an empty eight-stage DVC project.

    make bench            # or: .venv/bin/python benchmarks/pipeline.py

Works in a copy of the checkout; writes benchmarks/results/pipeline.json. Each figure of the second kind is the median of runs taken in turn.
"""
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, machine, save, timed

ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}


def run(*command: str, cwd: Path) -> float:
    "Wall seconds that a command took"
    return timed(*command, cwd=cwd, env=ENV)[0]


def checkout(folder: Path) -> Path:
    "A copy of what git would commit"
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return committed(folder)


def committed(folder: Path) -> Path:
    "Put a folder under git, as a project is"
    run("git", "init", "-q", cwd=folder)
    run("git", "add", ".", cwd=folder)
    run("git", "-c", "user.name=bench", "-c", "user.email=bench@example.org", "commit", "-qm", "bench", cwd=folder)
    return folder


def empty_project(folder: Path) -> Path:
    "Eight stages that do nothing"
    run("git", "init", "-q", cwd=folder)
    run("dvc", "init", "-q", cwd=folder)
    (folder / "dvc.yaml").write_text("stages:\n" + "".join(f"  s{i}:\n    cmd: 'true'\n    outs: [o{i}]\n".replace("'true'", f"touch o{i}") for i in range(8)))
    run("dvc", "repro", "-q", cwd=folder)
    return committed(folder)


def main(rounds: int = 9) -> None:
    "Measure and write"
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        ours, empty = checkout(Path(a)), empty_project(Path(b))
        env_path = os.environ.get("PYTHONPATH", "")
        ENV["PYTHONPATH"] = f"{ours}{os.pathsep}{env_path}"
        nothing, cpu = timed("dvc", "repro", cwd=ours, env=ENV)
        pairs = [(run("dvc", "repro", cwd=ours), run("dvc", "repro", cwd=empty)) for _ in range(rounds)]
    save("pipeline", {
        "command": "python benchmarks/pipeline.py",
        "machine": machine("dvc", "scikit-learn", "mlflow"),
        "from_nothing_s": round(nothing, 1),
        "from_nothing_cpu_s": round(cpu, 1),
        "nothing_to_do_s": round(statistics.median(p[0] for p in pairs), 2),
        "empty_project_s": round(statistics.median(p[1] for p in pairs), 2),
        "ratio": round(statistics.median(p[0] / p[1] for p in pairs), 3),
    })


if __name__ == "__main__":
    main()
