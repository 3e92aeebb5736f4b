"""scikit-learn's models, packaged, and what the package shap says of them: run in an environment that has it (`tools/peers.py`), once, by `test_contributions.py`.

    python tests/shap_values.py FOLDER

packages each model into FOLDER and writes `found.json` there: of each the rows, and for each row the values of the columns of its matrix."""
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import shap
from sklearn.ensemble import ExtraTreesRegressor, GradientBoostingClassifier, GradientBoostingRegressor, HistGradientBoostingClassifier, HistGradientBoostingRegressor, RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.pipeline import Pipeline
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from mlops_nb.features import make_preprocessor, model_input
from mlops_nb.packaging import package

KINDS = {"fare": "number", "age": "number", "town": "category", "child": "boolean", "sold": "datetime"}


def rows(n=800, seed=0):
    "Canonical rows with holes, and answers of each task"
    rng = np.random.default_rng(seed)
    raw = pd.DataFrame({"fare": rng.gamma(2, 30, n), "age": rng.integers(1, 80, n), "town": rng.choice(["Cork", "Brest", "Ulm", None], n, p=[.4, .3, .2, .1]), "child": rng.choice([0.0, 1.0, np.nan], n),
                        "sold": pd.Timestamp("2012-04-01") + pd.to_timedelta(rng.integers(0, 9999, n), unit="h")})
    raw.loc[::7, "fare"] = np.nan
    value = raw.fare.fillna(50) + 30 * (raw.town == "Cork") + raw.age / 3 + rng.normal(0, 20, n)
    return model_input(raw, KINDS), {"late": np.where(value > 90, "late", "on time"), "three": np.digitize(value, [70, 110]), "value": value}


MODELS = {   # name: (style of the preparation, task, estimator)
    "hist": ("tree", "late", HistGradientBoostingClassifier(max_iter=40)), "hist of three": ("tree", "three", HistGradientBoostingClassifier(max_iter=20)), "hist of numbers": ("tree", "value", HistGradientBoostingRegressor(max_iter=40)),
    "hist, linear preparation": ("linear", "late", HistGradientBoostingClassifier(max_iter=40)), "boosting": ("linear", "late", GradientBoostingClassifier(n_estimators=40)),
    "boosting of numbers": ("linear", "value", GradientBoostingRegressor(n_estimators=40)), "forest": ("linear", "late", RandomForestClassifier(30, max_depth=8)), "forest of three": ("linear", "three", RandomForestClassifier(20, max_depth=6)),
    "forest of numbers": ("linear", "value", RandomForestRegressor(20)), "extra": ("linear", "value", ExtraTreesRegressor(20, max_depth=9)), "weighted": ("linear", "late", RandomForestClassifier(20, max_depth=6, class_weight="balanced")),
    "tree": ("tree", "late", DecisionTreeClassifier(max_depth=7)), "tree of numbers": ("tree", "value", DecisionTreeRegressor(max_depth=9)),
    "logistic": ("linear", "late", LogisticRegression()), "linear": ("linear", "value", LinearRegression()), "ridge": ("linear", "value", Ridge()), "logistic of three": ("linear", "three", LogisticRegression()),
}


def values(fitted, x, held):
    "Base value and values, shape (rows, features, outputs)"
    prepare, estimator = fitted[:-1], fitted[-1]
    if hasattr(estimator, "coef_"):
        told = shap.LinearExplainer(estimator, shap.maskers.Independent(prepare.transform(x), max_samples=len(x)))
    else:
        told = shap.TreeExplainer(estimator)
    found, base = np.asarray(told.shap_values(prepare.transform(held))), np.ravel(told.expected_value)
    return base, found[..., None] if found.ndim == 2 else found


def main(folder):
    "Package each and tell what came out"
    warnings.simplefilter("ignore")
    x, answers = rows()
    found = {}
    for i, (name, (style, task, estimator)) in enumerate(MODELS.items()):
        fitted = Pipeline([("prepare", make_preprocessor(KINDS, style)), ("model", estimator.set_params(random_state=0) if "random_state" in estimator.get_params() else estimator)]).fit(x[:600], answers[task][:600])
        package(fitted, folder / str(i), name="m", sample=x[:600], holdout=x[600:])
        base, told = values(fitted, x[:600], held := x[600:640])
        found[name] = {"at": str(i), "rows": json.loads(held.to_json(orient="records", date_format="iso", double_precision=15)), "base": base.tolist(), "values": told.tolist()}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
