"What all measurements share: the machine's facts, CPU time of a command, results as JSON."
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))


def machine(*packages: str) -> dict:
    "Processor, cores, Python, versions of packages"
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else []
    return {"cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(), **{p: version(p) for p in packages}}


def timed(*command: str, **options) -> tuple[float, float]:
    "Wall and CPU seconds of a command, its children counted; stops when it fails"
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def save(name: str, figures: dict) -> None:
    "Write benchmarks/results/NAME.json and print it"
    path = ROOT / "benchmarks/results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(path.read_text())
