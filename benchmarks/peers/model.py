"""The model of the serving benchmark, trained alike in every environment: gradient boosting behind a preparation pipeline, 12 numbers and 4 categories.

With BUNDLE in the environment, a peer is given our compiled form of it instead: what remains is the server alone.
"""
import os

import numpy as np
import pandas as pd

NUMBERS, WORDS = [f"n{i}" for i in range(12)], [f"c{i}" for i in range(4)]


def table(rows=4000, seed=0):
    "Input rows and labels"
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({c: rng.normal(size=rows) for c in NUMBERS} | {c: rng.choice([f"level{k}" for k in range(7)], rows) for c in WORDS})
    late = frame.n0 + frame.n1 * frame.n2 + (frame.c0 == "level1") + rng.normal(size=rows) > 0.5
    return frame, np.where(late, "late", "on time")


def fitted():
    "The fitted pipeline"
    from sklearn.compose import ColumnTransformer
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler
    prepare = ColumnTransformer([("numbers", make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), NUMBERS),
                                 ("words", OneHotEncoder(handle_unknown="ignore", sparse_output=False), WORDS)])
    return make_pipeline(prepare, HistGradientBoostingClassifier(max_iter=100, early_stopping=False, random_state=0)).fit(*table())


def answerer():
    "What turns rows into labels: the pipeline on a frame, or the compiled model of a bundle"
    if folder := os.environ.get("BUNDLE"):
        from mlops_nb.bundle import load_bundle
        ask = load_bundle(folder).program.predict_rows
        return lambda rows: ask(rows)[0]
    model = fitted()
    return lambda rows: model.predict(pd.DataFrame(rows)).tolist()
