"The whole pipeline on other people's tables: well-known ones and awkward ones."
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn import datasets, metrics

sys.path.insert(0, str(Path(__file__).parent))
import project  # noqa: E402

from mlops_nb.bundle import load_bundle  # noqa: E402
from mlops_nb.core import MlopsError, load_params, read_frame, read_json  # noqa: E402
from mlops_nb.pipeline.layout import BUNDLE, METRICS, PREDICTIONS, STAGES  # noqa: E402
from mlops_nb.pipeline.project import new_project  # noqa: E402
from mlops_nb.registry import versions  # noqa: E402
from mlops_nb.serving.models import load_served  # noqa: E402


def known(name: str) -> tuple[pd.DataFrame, str, str]:
    "One of scikit-learn's own tables"
    data = getattr(datasets, f"load_{name}")(as_frame=True)
    frame = data.frame.rename(columns={"target": "answer"})
    return frame, "answer", "regression" if name == "diabetes" else "multiclass" if data.target.nunique() > 2 else "binary"


@pytest.mark.parametrize("name", ["breast_cancer", "iris", "wine", "diabetes"])
def test_known_tables_pass_their_gate(tmp_path, name):
    frame, target, task = known(name)
    folder = project.make(tmp_path / name, frame, target)
    assert load_params(folder / "params.yaml").base.task == task
    verdict = project.run(folder)
    assert verdict["passed"], verdict["reasons"]
    answers = load_bundle(folder / BUNDLE).predict(frame.drop(columns=target).head(20))
    assert len(answers) == 20


def awkward(rng: np.random.Generator, n: int) -> pd.DataFrame:
    "A table with everything that goes wrong in tables"
    x = rng.normal(size=n)
    frame = pd.DataFrame(
        {
            "number": np.where(rng.random(n) < 0.3, np.nan, x),
            "whole": rng.integers(0, 5, n),
            "text": rng.choice(["a", "b", "ünï", "with space", None], n),
            "flag": rng.choice([True, False, None], n),
            "day": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 300, n), unit="D"),
            "constant": 1,
            "nothing": None,
            "level": pd.Categorical(rng.choice(["low", "high"], n)),
            "identifier": [f"row-{i}" for i in range(n)],
            "huge": rng.normal(size=n) * 1e100,
            "infinite": np.where(rng.random(n) < 0.02, np.inf, x),
            "column with, \"odd\" name": rng.random(n),
        }
    )
    frame["answer"] = np.where(x + rng.normal(size=n) > 0, "yes", "no")
    return frame


@pytest.mark.parametrize("n", [30, 60, 1500])
@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_awkward_tables_run_through(tmp_path, n, task):
    frame = awkward(np.random.default_rng(n), n)
    if task == "multiclass":
        frame["answer"] = np.random.default_rng(0).choice(["one", "two", "three"], n)
    if task == "regression":
        frame["answer"] = frame.number.fillna(0) * 3 + np.random.default_rng(1).normal(size=n)
    folder = project.make(tmp_path / "a project", frame, "answer")
    project.run(folder)
    metrics = read_json(folder / METRICS)
    assert metrics["rows"] == len(read_frame(folder / PREDICTIONS)) > 0


def test_a_time_column_splits_in_time(tmp_path):
    frame = awkward(np.random.default_rng(3), 400)
    folder = project.make(tmp_path / "timed", frame, "answer", time="day")
    project.run(folder)
    assert load_params(folder / "params.yaml").train.split.method == "temporal"
    assert len(list((folder / "data/raw").glob("2024-*.parquet"))) == 10


def test_wide_and_narrow(tmp_path):
    rng = np.random.default_rng(0)
    wide = pd.DataFrame(rng.normal(size=(120, 300)), columns=[f"c{i}" for i in range(300)]).assign(answer=rng.random(120) > 0.5)
    narrow = pd.DataFrame({"only": rng.normal(size=200)}).assign(answer=lambda f: f.only > 0)
    project.run(project.make(tmp_path / "wide", wide, "answer"))
    assert project.run(project.make(tmp_path / "narrow", narrow, "answer"))["passed"]


def test_rows_without_an_answer_are_left_out(tmp_path):
    frame, target, _ = known("breast_cancer")
    frame = frame.astype({target: object})
    frame.loc[:99, target] = None
    folder = project.make(tmp_path / "partly", frame, target)
    project.run(folder, "ingest", "validate", "featurize")
    assert read_json(folder / "data/features/columns.json")["unlabelled"] == 100


@pytest.mark.parametrize(
    "target, values, message",
    [("answer", [1] * 50, "same value"), ("answer", [None] * 50, "no row has a value"), ("answr", range(50), "did you mean 'answer'"), ("answer", [f"t{i}" for i in range(50)], "too many classes")],
)
def test_a_target_that_cannot_be_learnt_is_refused_by_name(tmp_path, target, values, message):
    frame = pd.DataFrame({"x": range(50), "answer": pd.Series(list(values), dtype=object)})
    with pytest.raises(MlopsError, match=message):
        project.make(tmp_path / "p", frame, target)


def test_columns_may_have_any_name(tmp_path):
    rng = np.random.default_rng(5)
    names = ["happy?", "Monthly fee (€)", "time: when", "[x]", "yes", "# calls", '"q"', "it's", "a, b", "- c", "null", "&x", "tab\there", "50%", "{y}"]
    frame = pd.DataFrame({n: rng.choice(["p", "q", "r"], 200) if i % 2 else rng.normal(size=200) for i, n in enumerate(names)})
    frame["time: when"] = pd.date_range("2024-01-01", periods=200, freq="D")
    frame["Churned? (yes/no)"] = np.where(frame["happy?"] + rng.normal(size=200) / 2 > 0, "Yes", "No")
    folder = project.make(tmp_path / "any name", frame, "Churned? (yes/no)", time="time: when")
    assert project.run(folder)["passed"]
    served = load_served(folder / BUNDLE)
    assert served.door.check([served.bundle.input_example]) == []


def test_a_project_that_could_not_be_made_leaves_none(tmp_path, monkeypatch):
    from mlops_nb.pipeline import project as making

    def broken(*_):
        raise MlopsError("`dvc add` failed")
    frame, target, _ = known("iris")
    with monkeypatch.context() as m:
        m.setattr(making, "_dvc", broken)
        with pytest.raises(MlopsError, match="dvc add"):
            project.make(tmp_path / "later", frame, target)
    assert not (tmp_path / "later/params.yaml").exists()
    project.make(tmp_path / "later", frame, target)
    assert (tmp_path / "later/params.yaml").exists()


def test_a_table_as_spreadsheets_elsewhere_write_it(tmp_path):
    rng = np.random.default_rng(7)
    day = pd.date_range("2024-01-01", periods=300, freq="D").strftime("%d.%m.%Y")
    frame = pd.DataFrame({"": range(300), "Größe (m²)": rng.gamma(4, 20, 300).round(1), "Tag": day, "Preis": rng.gamma(4, 20, 300).round(2)})
    frame.to_csv(tmp_path / "Häuser.CSV", sep=";", decimal=",", index=False, encoding="utf-8-sig", lineterminator="\r\n")
    with pytest.raises(MlopsError, match="time_format"):
        new_project(tmp_path / "p", tmp_path / "Häuser.CSV", "Preis", time="Tag")
    said = new_project(tmp_path / "p", tmp_path / "Häuser.CSV", "Preis", time="Tag", time_format="%d.%m.%Y")
    assert "left out, the number of the row: Unnamed: 0" in said
    project.run(tmp_path / "p", "ingest", "validate", "featurize")
    table = read_frame(tmp_path / "p/data/features/features.parquet")
    assert table["Größe (m²)"].tolist() == frame["Größe (m²)"].tolist() and table["Preis"].tolist() == frame["Preis"].tolist()
    assert table["Tag"].min() == pd.Timestamp("2024-01-01") and len(table) == 300


@pytest.mark.parametrize("task, values, message", [("regression", ["a", "b"], "'a' is none"), ("binary", ["a", "b", "c"], "it has 3"), ("multiclass", [f"{i},5" for i in range(60)], "looks like numbers")])
def test_a_task_that_the_target_does_not_allow_is_refused(tmp_path, task, values, message):
    frame = pd.DataFrame({"x": np.random.default_rng(0).normal(size=60), "answer": (values * 60)[:60]})
    with pytest.raises(MlopsError, match=message):
        project.make(tmp_path / "p", frame, "answer", task=task)


def test_the_class_that_is_looked_for_is_named_in_params(tmp_path):
    "Of good and bad credits one looks for the bad ones: scores, metrics, the server's program and a comparison with the champion are about them"
    rng = np.random.default_rng(4)
    x = rng.normal(size=600)
    credit = pd.DataFrame({"x": x, "class": np.where(x + rng.normal(size=600) / 2 > 0, "bad", "good")})
    folder = project.make(tmp_path / "credit", credit, "class")
    params = folder / "params.yaml"
    assert 'positive: "good"' in params.read_text()
    found = {}
    for positive in ("good", "bad"):
        params.write_text(re.sub("positive: .*", f"positive: {positive}", params.read_text()))
        project.run(folder, *STAGES)
        told, bundle = read_json(folder / METRICS), load_bundle(folder / BUNDLE)
        rows = credit.head(50)
        answers = load_served(folder / BUNDLE).answer(rows[["x"]].to_dict("records"))
        assert bundle.manifest["classes"][1] == positive and bundle.predict(rows).tolist() == answers.labels
        assert [s > 0.5 for s in answers.scores] == [label == positive for label in answers.labels]
        asked = read_frame(folder / PREDICTIONS)
        truth, said = asked.truth == positive, asked.prediction == positive
        theirs = {"precision": metrics.precision_score(truth, said), "recall": metrics.recall_score(truth, said), "roc_auc": metrics.roc_auc_score(truth, asked.score),
                  "average_precision": metrics.average_precision_score(truth, asked.score), "brier": metrics.brier_score_loss(truth, asked.score)}
        assert {m: told[m]["value"] for m in theirs} == pytest.approx(theirs, abs=1e-5)
        found[positive] = told["roc_auc"]["value"]
    assert found["good"] == pytest.approx(found["bad"], abs=1e-3)
    assert versions("credit", root=folder).semver.tolist() == ["2.0.0", "1.0.0"]      # what the score means has changed
