"Run the gates, the notebooks and the tests; end in one line of counts. With --gates only the gates."
import filecmp
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
QUIET = {**os.environ, "PYTHONWARNINGS": "ignore", "DVC_NO_ANALYTICS": "1", "MPLBACKEND": "agg", "PYDEVD_DISABLE_FILE_VALIDATION": "1", "GOMP_SPINCOUNT": "500"}


def call(*command: str, cwd: Path = ROOT) -> tuple[bool, str]:
    "Run a command; whether it succeeded and what it printed"
    done = subprocess.run(command, cwd=cwd, env=QUIET, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode == 0, done.stdout


def differing(ours: Path, theirs: Path, pattern: str) -> list[str]:
    "Names of the files below two folders that are not the same"
    names = {p.relative_to(base).as_posix() for base in (ours, theirs) for p in base.rglob(pattern) if ".ipynb_checkpoints" not in p.parts}
    return sorted(n for n in names if not ((ours / n).exists() and (theirs / n).exists() and filecmp.cmp(ours / n, theirs / n, shallow=False)))


def in_sync() -> tuple[bool, str]:
    "Export and clean a copy of the notebooks: nothing may change"
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)
        for name in ("nbs", "mlops_nb"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        for name in ("settings.ini", "pyproject.toml"):
            shutil.copy(ROOT / name, copy)
        ok, text = call("nbdev_export", cwd=copy)
        ok2, text2 = call("nbdev_clean", cwd=copy)
        wrong = differing(ROOT / "mlops_nb", copy / "mlops_nb", "*.py") + differing(ROOT / "nbs", copy / "nbs", "*.ipynb")
    return ok and ok2 and not wrong, text + text2 + "".join(f"{n}: not in sync or not clean; run `make export`\n" for n in wrong)


GATES = {
    "exports in sync, notebooks clean": in_sync,
    "README current": lambda: call(sys.executable, "tools/readme.py", "--check"),
    "measures current": lambda: call(sys.executable, "tools/measures.py", "--check"),
    "dvc.yaml lists what stages import": lambda: call(sys.executable, "tools/dvc_deps.py", "--check"),
    "ruff": lambda: call("ruff", "check", "mlops_nb", "tests", "tools", "benchmarks"),
}


def notebooks() -> tuple[int, int, str]:
    "Passed and failed notebooks by nbdev_test, and what it printed"
    books = [p for p in (ROOT / "nbs").rglob("*.ipynb") if "jobs" not in p.parts and ".ipynb_checkpoints" not in p.parts and not p.name.startswith("_")]
    ok, text = call("nbdev_test", "--n_workers", str(min(4, os.cpu_count() or 1)), "--skip_folder_re", r"^([_.].*|jobs)$")
    failed = 0 if ok else max(1, len(set(re.findall(r"^\t(\S+\.ipynb)", text, flags=re.M))))
    return len(books) - failed, failed, "" if ok else text


def pytests(*options: str) -> tuple[int, int, int, str]:
    "Passed, failed and skipped tests, and what pytest printed, or the slowest tests where all is well"
    with tempfile.TemporaryDirectory() as tmp:
        report = Path(tmp) / "junit.xml"
        ok, text = call(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", f"--junitxml={report}", *options)
        if not report.exists():
            return 0, 1, 0, text
        found = ElementTree.parse(report).getroot().find("testsuite")
    suite, slow = found.attrib, sorted(found.iter("testcase"), key=lambda t: -float(t.get("time")))[:8]
    bad, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    if not ok and not bad:
        bad = 1
    notes = [line for line in text.splitlines() if line.startswith("SKIPPED")] + ["        slowest: " + ", ".join(f"{t.get('name')} {float(t.get('time')):.0f} s" for t in slow)]
    return int(suite["tests"]) - bad - skipped, bad, skipped, text if bad else "\n".join(notes)


def main() -> int:
    "Run all and report; 0 when nothing failed"
    passed = failed = skipped = 0
    for name, gate in GATES.items():
        start = time.monotonic()
        ok, text = gate()
        passed, failed = passed + ok, failed + (not ok)
        print(f"{'ok    ' if ok else 'FAILED'}  {name} ({time.monotonic() - start:.0f} s)" + ("" if ok else f"\n{text}"), flush=True)
    if "--gates" not in sys.argv:
        cores = str(min(4, os.cpu_count() or 1))
        for name, run in (("notebooks", notebooks), ("job notebooks", lambda: pytests("--nbval-lax", "nbs/jobs")),
                          ("tests", lambda: pytests("-n", cores, "--dist", "loadgroup", "-m", "not drill and not soak", "tests"))):
            start = time.monotonic()
            good, bad, *rest, text = run()
            passed, failed, skipped = passed + good, failed + bad, skipped + sum(rest)
            print(f"{'FAILED' if bad else 'ok    '}  {name}: {good} passed, {bad} failed ({time.monotonic() - start:.0f} s)" + (f"\n{text}" if text else ""), flush=True)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
