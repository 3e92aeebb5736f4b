"The compiled form: equal to the original or refused, on any row and for any model; and a proof that finds what converters get wrong."
import json
import math
import subprocess
import sys
import warnings
from datetime import timedelta

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.compose import ColumnTransformer
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.ensemble import (
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import ElasticNet, GammaRegressor, LogisticRegression, PoissonRegressor, Ridge, RidgeClassifier, SGDClassifier, TweedieRegressor
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, OneHotEncoder, OrdinalEncoder, RobustScaler, StandardScaler, TargetEncoder
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from mlops_nb.bundle import load_bundle
from mlops_nb.bundle.compiled import _READERS, Compiled
from mlops_nb.core import MlopsError
from mlops_nb.features import make_preprocessor, model_input
from mlops_nb.packaging import package
from mlops_nb.packaging.compile import compile_model
from mlops_nb.packaging.proof import make_probes, original, prove, split_points
from mlops_nb.packaging.trees import ensemble_of
from mlops_nb.validation import Schema

warnings.filterwarnings("ignore")
KINDS = {"fare": "number", "age": "number", "town": "category", "child": "boolean", "sold": "datetime"}


def rows(n=300, seed=0):
    "Canonical rows with holes, and answers of each task"
    rng = np.random.default_rng(seed)
    raw = pd.DataFrame({"fare": rng.gamma(2, 30, n), "age": rng.integers(1, 80, n), "town": rng.choice(["Cork", "Brest", "Ulm", "Oslo", None], n, p=[.4, .3, .2, .02, .08]),
                        "child": rng.choice([0.0, 1.0, np.nan], n), "sold": pd.Timestamp("2012-04-01") + pd.to_timedelta(rng.integers(0, 9999, n), unit="h")})
    raw.loc[::7, "fare"] = np.nan
    raw.loc[::31, "sold"] = pd.NaT
    value = raw.fare.fillna(50) + 30 * (raw.town == "Cork") + raw.age / 3 + rng.normal(0, 20, n)
    return model_input(raw, KINDS), {"binary": np.where(value > 90, "late", "on time"), "multiclass": np.digitize(value, [70, 110]), "regression": np.abs(value) + 1}


MODELS = [
    ("tree", "binary", HistGradientBoostingClassifier(max_iter=8)), ("tree", "multiclass", HistGradientBoostingClassifier(max_iter=8)),
    ("tree", "regression", HistGradientBoostingRegressor(max_iter=8)), ("tree", "regression", HistGradientBoostingRegressor(max_iter=8, loss="poisson")),
    ("tree", "regression", HistGradientBoostingRegressor(max_iter=8, loss="gamma")), ("tree", "regression", HistGradientBoostingRegressor(max_iter=8, loss="quantile", quantile=.9)),
    ("linear", "binary", GradientBoostingClassifier(n_estimators=8)), ("linear", "multiclass", GradientBoostingClassifier(n_estimators=5)),
    ("linear", "binary", GradientBoostingClassifier(n_estimators=8, loss="exponential")), ("linear", "regression", GradientBoostingRegressor(n_estimators=8, loss="huber")),
    ("linear", "binary", GradientBoostingClassifier(n_estimators=8, init="zero")),
    ("tree", "binary", RandomForestClassifier(10)), ("tree", "multiclass", RandomForestClassifier(10, max_depth=5)), ("tree", "regression", RandomForestRegressor(10)),
    ("tree", "binary", ExtraTreesClassifier(10)), ("linear", "regression", ExtraTreesRegressor(10)),
    ("tree", "multiclass", DecisionTreeClassifier()), ("tree", "regression", DecisionTreeRegressor(criterion="absolute_error", max_depth=4)),
    ("linear", "binary", LogisticRegression()), ("linear", "multiclass", LogisticRegression()), ("linear", "binary", SGDClassifier(loss="log_loss")),
    ("linear", "multiclass", SGDClassifier(loss="log_loss")), ("linear", "multiclass", SGDClassifier()), ("linear", "binary", LinearSVC()), ("linear", "multiclass", RidgeClassifier()),
    ("linear", "regression", Ridge()), ("linear", "regression", ElasticNet()), ("linear", "regression", PoissonRegressor()), ("linear", "regression", GammaRegressor()),
    ("linear", "regression", TweedieRegressor(power=1.5)), ("linear", "regression", TweedieRegressor(power=0)),
    ("tree", "binary", DummyClassifier()), ("tree", "multiclass", DummyClassifier(strategy="most_frequent")), ("tree", "regression", DummyRegressor(strategy="median")),
]


@pytest.mark.parametrize(("style", "task", "estimator"), [m if i % 4 == 0 else pytest.param(*m, marks=pytest.mark.drill) for i, m in enumerate(MODELS)], ids=lambda x: type(x).__name__ if hasattr(x, "fit") else x)
def test_each_estimator_is_compiled_and_proven(tmp_path, style, task, estimator):
    x, answers = rows()
    if "random_state" in estimator.get_params():
        estimator.set_params(random_state=0)
    model = Pipeline([("prepare", make_preprocessor(KINDS, style)), ("model", estimator)]).fit(x[:200], answers[task][:200])
    bundle = package(model, tmp_path / "b", name="m", sample=x[:200], holdout=x[200:])
    assert bundle.compiled, bundle.proof["reason"]
    assert bundle.proof["difference"] <= 1e-9
    labels, scores = bundle.predict_rows(json.loads(x[200:].to_json(orient="records", date_format="iso", double_precision=15)))
    expected = model.predict(x[200:])
    assert np.allclose(labels, expected, rtol=1e-9) if task == "regression" else labels == expected.tolist()
    if task == "binary" and hasattr(model, "predict_proba"):
        assert np.allclose(scores, model.predict_proba(x[200:])[:, 1], rtol=0, atol=1e-9)
    if scores is None:
        assert task == "regression" or not hasattr(model, "predict_proba")


@pytest.mark.parametrize("scaler", [StandardScaler(), *(pytest.param(s, marks=pytest.mark.drill) for s in (
    StandardScaler(with_mean=False), StandardScaler(with_std=False), RobustScaler(), RobustScaler(with_centering=False), MinMaxScaler(), MinMaxScaler((-1, 3), clip=True), MaxAbsScaler()))], ids=str)
def test_pipelines_of_other_people(tmp_path, scaler):
    rng = np.random.default_rng(0)
    x = pd.DataFrame({"n": rng.integers(0, 9, 300), "word": rng.choice(list("abcd"), 300), "belt": rng.integers(1, 5, 300), "flag": rng.random(300) < .5, "gap": rng.normal(size=300)})
    x.loc[::9, "gap"] = np.nan
    y = np.where(x.n + 3 * (x.word == "a") + rng.normal(size=300) > 5, 1, 0)
    mixed = ColumnTransformer([("gap", make_pipeline(SimpleImputer(add_indicator=True), scaler), ["gap", "n"]), ("word", OneHotEncoder(handle_unknown="ignore", drop="if_binary"), ["word", "flag"]),
                               ("belt", TargetEncoder(random_state=0), ["belt", "word"]), ("order", OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1), ["word"])],
                              remainder="passthrough")
    for last in (LogisticRegression(), RandomForestClassifier(5, random_state=0)):
        bundle = package(make_pipeline(mixed, MaxAbsScaler(), last).fit(x[:200], y[:200]), tmp_path / "b", name="m", sample=x[:200], holdout=x[200:])
        assert bundle.compiled and not bundle.signature["canonical"], bundle.proof["reason"]


def test_what_cannot_be_compiled_is_served_by_the_original(tmp_path):
    x, answers = rows()
    model = Pipeline([("prepare", make_preprocessor(KINDS, "linear")), ("model", KNeighborsRegressor())]).fit(x, answers["regression"])
    bundle = package(model, tmp_path / "b", name="m", sample=x)
    assert not bundle.compiled and bundle.proof["reason"] == "the estimator KNeighborsRegressor has no compiled form"
    assert not {"compiled.json", "trees.onnx"} & set(bundle.manifest["files"])
    values, scores = bundle.predict_rows(json.loads(x.to_json(orient="records", date_format="iso", double_precision=15)))
    assert np.allclose(values, model.predict(x)) and scores is None


# ---- what converters get wrong ----

def by_skl2onnx(model, x):
    "A model of numbers converted by skl2onnx, as a function of a frame"
    import onnxruntime as ort
    from skl2onnx import to_onnx
    session = ort.InferenceSession(to_onnx(model, x[:1].to_numpy(np.float32), options={"zipmap": False}).SerializeToString(), providers=["CPUExecutionProvider"])

    def answer(frame):
        with np.errstate(over="ignore"):
            return tuple(session.run(None, {"X": frame.to_numpy(np.float32)}))
    return answer


@pytest.fixture(scope="module")
def trees():
    "Histogram gradient boosting on numbers; converted by skl2onnx it computes in float32"
    rng = np.random.default_rng(0)
    x = pd.DataFrame(rng.gamma(2, 30, (3000, 4)), columns=list("abcd"))
    y = (x.a + x.b * x.c / 50 + rng.normal(0, 20, 3000) > 120).to_numpy().astype(int)
    return HistGradientBoostingClassifier(max_iter=50, random_state=0).fit(x[:2000], y[:2000]), x


def test_the_proof_finds_thresholds_in_single_precision(trees):
    model, x = trees
    kinds = dict.fromkeys(x, "number")
    program, graph = compile_model(model, x, kinds, False)
    points = split_points(program, ensemble_of(model).trees, x[2000:].to_numpy())
    probes = make_probes(x[2000:], kinds, points)
    converted = by_skl2onnx(model, x)
    held_out = prove(original(model), converted, {"holdout": probes["holdout"].round(1)})
    found = prove(original(model), converted, probes)
    assert held_out["difference"] < .1
    assert found["reason"] and found["difference"] > .01  # no error, other probabilities
    assert "thresholds" in prove(original(model), converted, {"thresholds": probes["thresholds"]})["reason"]
    compiled = Compiled(program, graph)
    assert prove(original(model), lambda f: compiled.answers(compiled.table(f)), probes)["difference"] <= 1e-15


def test_the_proof_finds_native_categories_that_skl2onnx_forgets():
    rng = np.random.default_rng(0)
    x = pd.DataFrame({"code": rng.integers(0, 12, 2000).astype(float), "size": rng.normal(size=2000)})
    y = (np.isin(x.code, [1, 4, 7, 10]) ^ (rng.random(2000) < .05)).astype(int)
    model = HistGradientBoostingClassifier(max_iter=30, categorical_features=[0], random_state=0).fit(x, y)
    found = prove(original(model), by_skl2onnx(model, x), {"holdout": x})
    assert found["difference"] > .1 and "holdout" in found["reason"]
    with pytest.raises(MlopsError, match="native categorical"):
        compile_model(model, x, {"code": "number", "size": "number"}, False)


@pytest.mark.parametrize("part", ["weights", "splits"])
def test_the_proof_finds_a_single_changed_number(trees, part):
    import onnx
    model, x = trees
    kinds = dict.fromkeys(x, "number")
    program, graph = compile_model(model, x, kinds, False)
    probes = make_probes(x[2000:], kinds, split_points(program, ensemble_of(model).trees, x[2000:].to_numpy()))
    for i in (1, 77, 500):
        spoilt = onnx.load_from_string(graph)
        tensor = next(a.t for a in spoilt.graph.node[0].attribute if a.t.name == part)
        values = np.frombuffer(tensor.raw_data).copy()
        values[i] = values[i] + 1e-3 if part == "weights" else np.nextafter(np.nextafter(values[i], np.inf), np.inf)
        tensor.raw_data = values.tobytes()
        compiled = Compiled(program, spoilt.SerializeToString())
        found = prove(original(model), lambda f, c=compiled: c.answers(c.table(f)), probes)
        assert found["reason"] and "thresholds" in prove(original(model), lambda f, c=compiled: c.answers(c.table(f)), {"thresholds": probes["thresholds"]})["reason"]


# ---- any value, any row ----

VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-9, 9), st.floats(), st.text(max_size=6), st.from_regex(r"[+-]?[0-9.]{1,5}(e[0-9]{1,3})?", fullmatch=True),
                   st.sampled_from(["Cork", "Brest", "7", "7.0", "nan", "None", "inf", "-Infinity", "1_0", " 1", "１", "true", "FALSE ", ""]), st.datetimes(), st.dates(),
                   st.datetimes().map(lambda t: t.isoformat()), st.datetimes().map(lambda t: f"{t:%Y-%m-%d %H:%M}+02:00"), st.timedeltas(timedelta(-99), timedelta(99)), st.lists(st.integers(), max_size=2))


def canonical(kind, value):
    "What training would have made of a value: a float, text, a time, None when it is missing; an error when it is refused"
    found = model_input(pd.DataFrame({"x": pd.Series([value], dtype=object).infer_objects()}), {"x": kind}).x[0]
    return None if found is None or found != found else found


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(["number", "boolean", "category", "datetime"]), VALUES)
def test_a_reader_gives_what_training_gave_or_refuses(kind, value):
    options = {"width": 2, "levels": [["Cork", [[0, 1.0]]], ["7", [[0, 7.0]]], ["True", [[0, 3.0]]], ["", [[0, 4.0]]]], "missing": [[1, 1.0]], "unseen": []} if kind == "category" else {}
    try:
        read = _READERS[kind](column="x", **options)(value)
    except MlopsError as e:
        assert "column 'x'" in str(e)
        return
    truth = canonical(kind, value)
    if kind == "category":
        assert read == ((0.0, 1.0) if truth is None else ({"Cork": 1.0, "7": 7.0, "True": 3.0, "": 4.0}.get(truth, 0.0), 0.0))
    elif truth is None:
        assert all(math.isnan(x) for x in read)
    elif kind == "datetime":
        assert read == (truth.month, truth.day, truth.day_of_week, truth.hour)
    else:
        assert math.isclose(read[0], truth, rel_tol=1e-13)       # pandas rounds the last digit of some spelled numbers wrongly


ROWS = st.fixed_dictionaries({
    "fare": st.one_of(st.none(), st.floats(), st.floats(0, 200), st.integers(0, 200)), "age": st.one_of(st.none(), st.integers(-5, 200), st.floats(width=32)),
    "town": st.one_of(st.none(), st.sampled_from(["Cork", "Brest", "Ulm", "Oslo"]), st.text(max_size=4)), "child": st.sampled_from([None, True, False, 0, 1, "true"]),
    "sold": st.one_of(st.none(), st.datetimes(pd.Timestamp("1700-01-01"), pd.Timestamp("2250-01-01")).map(lambda t: t.isoformat()))})


@pytest.fixture(scope="module")
def fitted():
    "A pipeline of each sort with its compiled form"
    x, answers = rows(400)
    out = []
    for style, task, estimator in (MODELS[0], MODELS[1], MODELS[6], MODELS[11], MODELS[13], MODELS[18], MODELS[25]):
        model = Pipeline([("prepare", make_preprocessor(KINDS, style)), ("model", estimator)]).fit(x, answers[task])
        out.append((model, Compiled(*compile_model(model, x, KINDS, True))))
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A bundle of a pipeline on canonical rows"
    x, answers = rows(400)
    model = Pipeline([("prepare", make_preprocessor(KINDS)), ("model", HistGradientBoostingClassifier(max_iter=8, random_state=0))]).fit(x, answers["binary"])
    schema = Schema.infer(x.assign(child=x.child == 1))
    for column in schema.columns.values():
        column.role, column.note = "feature", ""
    assert {c: column.kind for c, column in schema.columns.items()} == KINDS
    return package(model, tmp_path_factory.mktemp("small") / "b", name="m", sample=x, schema=schema)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(batch=st.lists(ROWS, min_size=1, max_size=8))
def test_any_rows_are_answered_as_the_pipeline_answers_them(fitted, batch):
    for model, compiled in fitted:
        try:
            truth = original(model, lambda f: model_input(f, KINDS))(pd.DataFrame(batch, columns=list(KINDS), dtype=object))
        except ValueError:
            with pytest.raises(MlopsError):
                compiled.predict_rows(batch)
            continue
        labels, p = compiled.answers(compiled.matrix(batch))
        if p is None:
            assert np.allclose(labels, truth[0], rtol=1e-9)
        else:
            assert labels.tolist() == truth[0].tolist() and np.abs(p - truth[1]).max() <= 1e-12
        alone = [compiled.predict_rows([row]) for row in batch]
        assert np.allclose([a[0][0] for a in alone], labels, rtol=1e-12) if p is None else [a[0][0] for a in alone] == labels.tolist()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**31), st.sampled_from([m for m in MODELS if "random_state" in m[2].get_params()]), st.integers(20, 120))
def test_any_fitted_model_is_equal_or_refused(seed, model, n):
    from sklearn.base import clone
    style, task, estimator = model
    x, answers = rows(n, seed)
    fitted = Pipeline([("prepare", make_preprocessor(KINDS, style)), ("model", clone(estimator).set_params(random_state=seed % 1000))])
    try:
        fitted.fit(x, answers[task])
    except ValueError:
        return  # one class only
    program, graph = compile_model(fitted, x, KINDS, True)
    compiled = Compiled(json.loads(json.dumps(program)), graph)
    ensemble = ensemble_of(fitted[-1])
    probes = make_probes(x, KINDS, split_points(program, ensemble.trees if ensemble else [], compiled.table(model_input(x, KINDS)), most=100))
    found = prove(original(fitted, lambda f: model_input(f, KINDS)), lambda f: compiled.answers(compiled.table(model_input(f, KINDS))), probes)
    assert found["reason"] is None and found["difference"] < 1e-9


# ---- frames of few rows ----

def maybe(values, *nothing):
    "A column's values: one of `nothing` among them"
    return st.lists(st.one_of(values, st.sampled_from(nothing)), min_size=1, max_size=5)


NUMBERS = [("float64", maybe(st.one_of(st.floats(), st.floats(0, 200)), None)), ("float32", maybe(st.floats(0, 200, width=32), None)), ("int64", st.lists(st.integers(-9, 200), min_size=1)),
           ("uint8", st.lists(st.integers(0, 200), min_size=1)), ("bool", st.lists(st.booleans(), min_size=1)), ("Int64", maybe(st.integers(-9, 200), pd.NA)), ("Float64", maybe(st.floats(0, 200), pd.NA)),
           ("Float32", maybe(st.floats(0, 200, width=32), pd.NA)), ("boolean", maybe(st.booleans(), pd.NA)), ("category", maybe(st.integers(0, 9), None)), ("timedelta64[ns]", maybe(st.timedeltas(timedelta(0), timedelta(1)), pd.NaT)),
           ("object", maybe(st.one_of(st.integers(-9, 9), st.floats(), st.sampled_from(["7", "2.5", " 1", "soon"])), None, np.nan, pd.NA, pd.NaT, np.float32(.1), np.int64(3)))]
TOWNS = st.one_of(st.sampled_from(["Cork", "Brest", "Ulm", "Oslo"]), st.text(max_size=3))
WORDS = [(t, maybe(TOWNS, None, np.nan)) for t in ("object", "str", "string", "category")] + [("object", maybe(st.one_of(TOWNS, st.integers(-9, 9), st.floats(0, 9), st.booleans()), None, np.nan, pd.NA, pd.NaT)), *NUMBERS[:9]]
TIMES = st.datetimes(pd.Timestamp("1700-01-01"), pd.Timestamp("2250-01-01"))
MOMENTS = [(f"datetime64[{u}]", maybe(TIMES, pd.NaT)) for u in ("s", "us", "ns")] + [
    ("datetime64[ns, Europe/Berlin]", maybe(TIMES, pd.NaT)), ("object", maybe(st.one_of(TIMES, TIMES.map(lambda t: t.date()), TIMES.map(lambda t: t.isoformat())), None, pd.NaT)), ("str", maybe(TIMES.map(lambda t: f"{t:%Y-%m-%d}"), None))]
CHILDREN = [("bool", st.lists(st.booleans(), min_size=1)), ("boolean", maybe(st.booleans(), pd.NA)), ("float64", maybe(st.sampled_from([0.0, 1.0]), None)), ("int64", st.lists(st.integers(0, 1), min_size=1)),
            ("object", maybe(st.sampled_from([True, False, "true", "False", 0, 1]), None, np.nan, pd.NA)), ("category", maybe(st.booleans(), None))]
OF = {"number": NUMBERS, "category": WORDS, "datetime": MOMENTS, "boolean": CHILDREN}


@st.composite
def frames(draw):
    "A pandas frame of few rows in any storage types"
    columns = {c: draw(st.sampled_from(OF[kind]).flatmap(lambda o: st.tuples(st.just(o[0]), o[1]))) for c, kind in KINDS.items()}
    n = min(len(values) for _, values in columns.values())
    return pd.DataFrame({c: pd.Series(values[:n], dtype=dtype) for c, (dtype, values) in columns.items()})[draw(st.permutations(list(KINDS)))]


def outcome(bundle, frame, n):
    "Probabilities of the first rows, or what is said of the frame"
    try:
        return bundle.predict_proba(frame)[:n]
    except MlopsError as e:
        return str(e)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(frame=frames())
def test_few_rows_are_answered_as_many_are(small, frame):
    n = len(frame)
    many = outcome(small, pd.concat([frame] * 65, ignore_index=True), n)
    for few in (frame, frame.assign(more=1)):
        found = outcome(small, few, n)
        assert np.array_equal(found, many) if not isinstance(many, str) else found == many, (found, many)
    try:
        table = pl.from_pandas(frame)
    except (TypeError, ValueError, pa.ArrowException):
        return                                               # a column of several types
    many, found = outcome(small, pl.concat([table] * 65), n), outcome(small, table, n)
    assert np.array_equal(found, many) if not isinstance(many, str) else found == many, (found, many)


def test_rows_are_answered_without_pandas_or_scikit_learn(tmp_path):
    x, answers = rows()
    model = Pipeline([("prepare", make_preprocessor(KINDS)), ("model", MODELS[0][2])]).fit(x, answers["binary"])
    package(model, tmp_path / "b", name="m", sample=x)
    program = f"""import sys
from mlops_nb.bundle import load_bundle
bundle = load_bundle({str(tmp_path / 'b')!r})
print(bundle.predict_rows([bundle.input_example, {{**bundle.input_example, 'town': None}}]))
print(bundle.predict_proba([bundle.input_example]).shape, {{'pandas', 'sklearn', 'skops', 'mlflow', 'scipy', 'polars'}} & set(sys.modules))"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "late" in out[0] or "on time" in out[0]
    assert out[1] == "(1, 2) set()"
    assert load_bundle(tmp_path / "b").predict_rows([]) == ([], [])
