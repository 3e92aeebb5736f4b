"""LightGBM's and XGBoost's models, packaged: run in an environment that has them (`tools/peers.py`), once, by `test_boosters.py`.

    python tests/boosters.py FOLDER

packages each model into FOLDER and writes `found.json` there: of each its proof, and what it answers on the held-out rows."""
import json
import sys
import warnings
from pathlib import Path

import lightgbm as lgb
import numpy as np
import pandas as pd
import xgboost as xgb
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from mlops_nb.features import make_preprocessor, model_input
from mlops_nb.packaging import package

KINDS = {"fare": "number", "age": "number", "days": "number", "town": "category", "child": "boolean", "sold": "datetime"}


def rows(n=900, seed=0):
    "Canonical rows with holes and many zeros, and answers of each task"
    rng = np.random.default_rng(seed)
    raw = pd.DataFrame({"fare": rng.gamma(2, 30, n), "age": rng.integers(1, 80, n), "days": np.where(rng.random(n) < .4, 0, rng.normal(0, 5, n)),
                        "town": rng.choice(["Cork", "Brest", "Ulm", "Oslo", None], n, p=[.4, .3, .2, .02, .08]), "child": rng.choice([0.0, 1.0, np.nan], n),
                        "sold": pd.Timestamp("2012-04-01") + pd.to_timedelta(rng.integers(0, 9999, n), unit="h")})
    raw.loc[::7, "fare"] = np.nan
    raw.loc[::5, "days"] = np.nan
    value = raw.fare.fillna(50) + 30 * (raw.town == "Cork") + raw.age / 3 + 20 * (raw.days == 0) + 2 * raw.days.fillna(9) + rng.normal(0, 20, n)
    answers = {"binary": (value > 90).astype(int), "text": np.where(value > 90, "late", "on time"), "multiclass": np.digitize(value, [70, 110]), "multiclass text": np.array(["a", "b", "c"])[np.digitize(value, [70, 110])],
               "regression": np.abs(value) + 1, "many": (np.abs(value) + 1) * 1e4, "counts": rng.poisson(np.exp(value / 40)), "logs": np.log(np.abs(value) + 1)}
    return model_input(raw, KINDS), answers


def light(kind, **options):
    return getattr(lgb, f"LGBM{kind}")(**{"n_estimators": 30, "verbose": -1, "n_jobs": 1, "random_state": 0, **options})


def xg(kind, **options):
    return getattr(xgb, f"XGB{kind}")(**{"n_estimators": 30, "n_jobs": 1, "random_state": 0, "max_depth": 4, **options})


R, C = "Regressor", "Classifier"
PIPELINES = {      # name: (style of the preparation, task, estimator)
    "light, binary": ("tree", "text", light(C)), "light, one-hot": ("linear", "text", light(C)), "light, three classes": ("tree", "multiclass text", light(C)),
    "light, factor": ("tree", "binary", light(C, sigmoid=.5)), "light, zero is missing": ("tree", "text", light(C, zero_as_missing=True)), "light, nothing is missing": ("tree", "text", light(C, use_missing=False)),
    "light, zero is missing, numbers": ("tree", "regression", light(R, zero_as_missing=True, num_leaves=63, min_child_samples=3)),
    "light, forest": ("tree", "text", light(C, boosting_type="rf", bagging_freq=1, bagging_fraction=.6)), "light, dart": ("tree", "text", light(C, boosting_type="dart")),
    "light, long": ("tree", "regression", light(R, n_estimators=1000, learning_rate=.02)),
    **{f"light, {o}": ("tree", "regression", light(R, objective=o)) for o in ("regression", "l1", "huber", "fair", "quantile", "mape", "poisson", "gamma", "tweedie")},
    "xg, binary": ("tree", "binary", xg(C)), "xg, one-hot": ("linear", "binary", xg(C)), "xg, three classes": ("tree", "multiclass", xg(C)), "xg, forest": ("tree", "binary", xg("RFClassifier")),
    "xg, forest of numbers": ("tree", "regression", xg("RFRegressor")), "xg, boosted forest": ("tree", "multiclass", xg(C, num_parallel_tree=3)), "xg, exact": ("tree", "binary", xg(C, tree_method="exact")),
    "xg, lossguide": ("tree", "regression", xg(R, grow_policy="lossguide", max_leaves=20, max_depth=0)), "xg, base score": ("tree", "binary", xg(C, base_score=.3)), "xg, pruned": ("tree", "binary", xg(C, gamma=2, max_depth=8)),
    "xg, long": ("tree", "regression", xg(R, n_estimators=1000, learning_rate=.02)), "xg, large numbers": ("tree", "many", xg(R, n_estimators=300)), "xg, many classes": ("tree", "multiclass", xg(C, n_estimators=200)),
    **{f"xg, {o}": ("tree", "counts" if "poisson" in o else "regression", xg(R, objective=o, n_estimators=300)) for o in ("reg:squarederror", "reg:absoluteerror", "count:poisson", "reg:gamma", "reg:tweedie")},
    "xg, huber": ("tree", "regression", xg(R, objective="reg:pseudohubererror", huber_slope=50)), "xg, quantile": ("tree", "regression", xg(R, objective="reg:quantileerror", quantile_alpha=.9)),
}
REFUSED = {        # name: (task, estimator)
    "light, ova": ("multiclass", light(C, objective="multiclassova")), "light, root": ("regression", light(R, reg_sqrt=True)), "light, cross entropy": ("binary", light(R, objective="cross_entropy")),
    "light, linear trees": ("regression", light(R, linear_tree=True)),
    "xg, dart": ("binary", xg(C, booster="dart", rate_drop=.3)), "xg, linear": ("binary", xg(C, booster="gblinear")), "xg, logistic": ("logs", xg(R, objective="reg:logistic")),
    "xg, missing": ("binary", xg(C, missing=0.0)),
}


def early(x, y, estimator, **more):
    "A pipeline whose estimator stopped early"
    prepare = make_preprocessor(KINDS).fit(x[:500], y[:500])
    estimator.fit(prepare.transform(x[:500]), y[:500], eval_set=[(prepare.transform(x[500:700]), y[500:700])], **more)
    return Pipeline([("prepare", prepare), ("model", estimator)])


def models():
    "Name, model, rows, whether it is to be compiled"
    x, answers = rows()
    for name, (style, task, estimator) in PIPELINES.items():
        yield name, Pipeline([("prepare", make_preprocessor(KINDS, style)), ("model", estimator)]).fit(x[:600], answers[task][:600]), x
    yield "light, stopped early", early(x, answers["text"], light(C, n_estimators=400, learning_rate=.3), callbacks=[lgb.early_stopping(5, verbose=False)]), x
    yield "xg, stopped early", early(x, answers["multiclass"], xg(C, n_estimators=400, early_stopping_rounds=5), verbose=False), x
    numbers = x[["fare", "age", "days"]]
    for name, estimator, task in (("light, bare", light(C), "text"), ("xg, bare", xg(C), "binary"), ("xg, bare numbers", xg(R), "regression"), ("light, bare, zero is missing", light(C, zero_as_missing=True), "text")):
        yield name, estimator.fit(numbers[:600], answers[task][:600]), numbers
    flags = numbers.assign(child=x.child == 1)
    yield "xg, truth values", xg(C).fit(flags[:600], answers["binary"][:600]), flags
    yield "light, truth values", light(C).fit(flags[:600], answers["binary"][:600]), flags
    own = ColumnTransformer([("gap", make_pipeline(SimpleImputer(add_indicator=True), StandardScaler()), ["fare", "age"]), ("word", OneHotEncoder(handle_unknown="ignore", sparse_output=False), ["town"])], remainder="passthrough")
    few = x[["fare", "age", "town", "days"]]
    for name, estimator in (("light, of other people", light(C)), ("xg, of other people", xg(C))):
        yield name, make_pipeline(own, estimator).fit(few[:600], answers["binary"][:600]), few
    split = numbers.assign(fare=numbers.fare * 0 + 1)          # one value or none: the threshold is infinite
    yield "light, only whether", light(C, min_child_samples=1).fit(split[:600], np.isnan(split.fare[:600]) * 1), split
    yield "xg, only whether", xg(C).fit(split[:600], np.isnan(split.fare[:600]) * 1), split
    for name, (task, estimator) in REFUSED.items():
        y = answers[task] / (answers[task].max() if task == "logs" else 1)
        yield name, estimator.fit(numbers[:600].fillna(1), y[:600]), numbers.fillna(1)
    towns = x[["town", "fare"]].assign(town=pd.Series(pd.factorize(x.town)[0], dtype=float))
    yield "light, categories", light(C).fit(towns[:600], answers["text"][:600], categorical_feature=[0]), towns
    yield "xg, categories", xg(C, feature_types=["c", "q"], enable_categorical=True, max_cat_to_onehot=1).fit(towns[:600].clip(lower=0), answers["binary"][:600]), towns.clip(lower=0)


def contributions(model, x):
    "What the library says that each column of its matrix adds, the base last; shape (rows, outputs, features + 1)"
    *steps, (_, estimator) = getattr(model, "steps", [(None, model)])
    X, n = np.asarray(model[:-1].transform(x) if steps else x, dtype=float), len(x)
    if hasattr(estimator, "booster_"):
        trees = estimator.booster_.num_trees() if estimator.boosting_type == "rf" else 1      # a forest's are not averaged, as its answers are
        return np.reshape(estimator.booster_.predict(X, pred_contrib=True), (n, -1, X.shape[1] + 1)) / trees
    last = getattr(estimator, "best_iteration", None)
    told = estimator.get_booster().predict(xgb.DMatrix(X, feature_names=estimator.get_booster().feature_names), pred_contribs=True, iteration_range=(0, 0 if last is None else last + 1))
    return np.reshape(told, (n, -1, X.shape[1] + 1)).astype(float)


def main(folder):
    "Package each and tell what came out"
    warnings.simplefilter("ignore")
    found = {}
    for i, (name, model, x) in enumerate(models()):
        bundle, held = package(model, folder / str(i), name="m", sample=x[:600], holdout=x[600:]), x[600:660]
        own = getattr(model, "predict_proba", model.predict)(held)
        found[name] = {"at": str(i), "compiled": bundle.compiled, **bundle.proof, "rows": json.loads(held.to_json(orient="records", date_format="iso", double_precision=15)),
                       "labels": model.predict(held).tolist(), "own": np.asarray(own, dtype=float).tolist(),
                       "contributions": contributions(model, held[:10]).tolist() if bundle.compiled else None}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
