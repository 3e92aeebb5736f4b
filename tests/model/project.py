"A project of one's own, made and run in this process: what the tests of the pipeline share."
import importlib
import re
from pathlib import Path

import pandas as pd

from mlops_nb.core import load_params, read_json, write_frame
from mlops_nb.pipeline.layout import GATE, STAGES
from mlops_nb.pipeline.project import new_project


def make(folder: Path, frame: pd.DataFrame, target: str, trials: int = 2, bootstrap: int = 50, **options) -> Path:
    "A new project in `folder` with a small search"
    source = folder.parent / f"{folder.name}.parquet"
    write_frame(source, frame)
    new_project(folder, source, target, **options)
    text = (folder / "params.yaml").read_text()
    text = re.sub(r"n_trials: \d+", f"n_trials: {trials}", text)
    text = re.sub(r"bootstrap: \d+", f"bootstrap: {bootstrap}", text)
    text = re.sub(r"importance_rows: \d+", "importance_rows: 100", text)
    text = text.replace("max_iter: {low: 50, high: 250, step: 50}", "max_iter: {low: 10, high: 20, step: 10}")
    (folder / "params.yaml").write_text(text)
    return folder


def run(folder: Path, *stages: str) -> dict:
    "Run stages (all but register if none is named) in this process; the gate's verdict"
    params = load_params(folder / "params.yaml")
    for name in stages or STAGES[:-1]:
        importlib.import_module(f"mlops_nb.pipeline.{name}").run(params, folder, **({"track": False} if name == "train" else {}))
    return read_json(folder / GATE) if (folder / GATE).exists() else {}
