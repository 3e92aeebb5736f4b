"Features: history against its definition, canonical form, encoders on awkward frames"
import subprocess
import sys
from datetime import datetime

import numpy as np
import pandas as pd
import pytest
import skops.io
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestRegressor
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline

from mlops_nb.core import History, MlopsError
from mlops_nb.features import Calendar, add_history, feature_table, guard_leakage, make_preprocessor, model_input

START = pd.Timestamp("2013-01-01")
hours = st.one_of(st.none(), st.integers(0, 12))
row = st.tuples(st.sampled_from(["x", "y", None]), st.sampled_from([0, 1]), hours, hours, st.one_of(st.none(), st.floats(-1e6, 1e6)))


def frame_of(rows):
    moment = lambda h: pd.NaT if h is None else START + pd.Timedelta(h, "h")
    column = lambda i, dtype: pd.Series([moment(r[i]) if dtype == "datetime64[us]" else r[i] for r in rows], dtype=dtype)
    return pd.DataFrame({"a": column(0, object), "b": column(1, int), "time": column(2, "datetime64[us]"), "known": column(3, "datetime64[us]"),
                         "value": column(4, float)})


def by_definition(frame, d):
    "Two nested loops over the definition"
    out = []
    for i in range(len(frame)):
        values = []
        for j in range(len(frame)):
            same = all(frame[k].iloc[i] is not None and frame[k].iloc[i] == frame[k].iloc[j] for k in d.by)
            t, k, v = frame["time"].iloc[i], frame["known"].iloc[j], frame["value"].iloc[j]
            if i != j and same and not np.isnan(v) and k < t and k >= t - pd.Timedelta(d.window): values.append(v)
        out.append(np.mean(values) if values else np.nan)
    return np.array(out)


@settings(max_examples=60)
@given(st.lists(row, max_size=25), st.sampled_from([[], ["a"], ["b"], ["a", "b"]]), st.sampled_from(["1h", "3h", "1D"]), st.randoms(use_true_random=False))
def test_history_is_its_definition(rows, by, window, random):
    frame = frame_of(rows + rows[:3])
    d = History(name="h", by=by, value="value", known="known", window=window)
    got = add_history(frame, [d], "time")["h"].to_numpy()
    np.testing.assert_allclose(got, by_definition(frame, d), rtol=1e-9, atol=1e-6)
    order = list(range(len(frame)))
    random.shuffle(order)
    np.testing.assert_array_equal(add_history(frame.iloc[order], [d], "time")["h"].to_numpy(), got[order])


@settings(max_examples=30)
@given(st.lists(row, min_size=1, max_size=25), st.integers(0, 12))
def test_history_does_not_see_the_future(rows, now):
    "What becomes known at or after a row's time may change in any way; the row's feature stays"
    frame, now = frame_of(rows), START + pd.Timedelta(now, "h")
    d = History(name="h", value="value", known="known", window="2D")
    changed = frame.assign(value=frame["value"].where(~(frame["known"] >= now), 1e9))
    past = (frame["time"] <= now).to_numpy()
    np.testing.assert_array_equal(add_history(frame, [d], "time")["h"][past], add_history(changed, [d], "time")["h"][past])


def test_history_one_huge_value_does_not_spoil_others():
    frame = frame_of([("x", 0, 5, 1, 1e300), ("y", 0, 5, 2, 1.0), ("y", 0, 5, 3, 2.0), ("y", 0, 6, 9, None)])
    d = History(name="h", by=["a"], value="value", known="known", window="1D")
    assert add_history(frame, [d], "time")["h"].iloc[3] == 1.5


def test_history_never_counts_the_row_itself():
    frame = pd.DataFrame({"time": [START + pd.Timedelta("2h")] * 2, "known": [START, START], "value": [1.0, 0.0]})
    got = add_history(frame, [History(name="h", value="value", known="known")], "time")["h"]
    assert got.tolist() == [0.0, 1.0]


def test_history_definitions_may_build_on_each_other_and_leave_the_input_alone():
    frame = frame_of([("x", 0, 3, 4, 1.0), ("x", 0, 6, 7, 3.0), ("x", 0, 9, None, None)])
    before = frame.copy()
    both = [History(name="h", value="value", known="known"), History(name="g", value="h", known="known")]
    assert add_history(frame, both, "time")["g"].tolist()[2] == 1.0
    pd.testing.assert_frame_equal(frame, before)


@pytest.mark.parametrize("name", ["dep_time", "dep_delay", "arr_time", "air_time"])
def test_leaks_are_refused_by_name(name):
    after = ["dep_time", "dep_delay", "arr_time", "arr_delay", "air_time", "arrived", "late"]
    with pytest.raises(MlopsError, match=f"'{name}' is known only after"): guard_leakage(["carrier", name], after)
    with pytest.raises(MlopsError, match=f"'{name}' is known only after"): feature_table(pd.DataFrame({name: [1.0]}), {name: "number"}, after=after)


values = {"number": st.one_of(st.none(), st.integers(-9, 9), st.floats(allow_nan=True, allow_infinity=True, width=32)),
          "boolean": st.sampled_from([True, False, None, 0, 1, "true"]),
          "category": st.one_of(st.none(), st.text(max_size=3), st.integers(0, 3), st.sampled_from([1.0, 2.5, float("nan")])),
          "datetime": st.one_of(st.none(), st.datetimes(datetime(1950, 1, 1), datetime(2200, 1, 1)), st.just("2013-01-01T00:00:00+01:00"))}


@st.composite
def tables(draw, min_rows=0):
    kinds = {f"c{i}": k for i, k in enumerate(draw(st.lists(st.sampled_from(list(values)), min_size=1, max_size=4)))}
    n = draw(st.integers(min_rows, 14))
    return pd.DataFrame({c: pd.Series(draw(st.lists(values[k], min_size=n, max_size=n)), dtype=object) for c, k in kinds.items()}), kinds


@settings(max_examples=50)
@given(tables())
def test_canonical_form_is_a_fixed_point(table):
    frame, kinds = table
    once = model_input(frame, kinds)
    assert list(once) == list(kinds) and len(once) == len(frame)
    pd.testing.assert_frame_equal(model_input(once, kinds), once)
    dtypes = {"number": "float64", "boolean": "float64", "category": "object", "datetime": "datetime64[us]"}
    assert [str(t) for t in once.dtypes] == [dtypes[k] for k in kinds.values()]


@settings(max_examples=30)
@given(tables(min_rows=4), st.sampled_from(["tree", "linear"]), st.data())
def test_encoders_take_any_frame(table, style, data):
    "Missing, constant, empty, one row short of a group: numbers come out, as many columns as names, and skops gives the same back"
    frame, kinds = table
    X = model_input(frame, kinds)
    prepare = make_preprocessor(kinds, style).fit(X)
    new = model_input(pd.DataFrame({c: pd.Series([data.draw(values[k]), None], dtype=object) for c, k in kinds.items()}), kinds)
    for rows in (X, new):
        Z = prepare.transform(rows)
        assert Z.dtype == np.float64 and Z.shape == (len(rows), len(prepare.get_feature_names_out()))
        assert np.isfinite(Z).all() or style == "tree"
    if style == "tree": assert not np.isnan(prepare.transform(X)).all(axis=0).any()
    back = skops.io.loads(skops.io.dumps(prepare), trusted=["mlops_nb.features.encoders.Calendar", "mlops_nb.features.encoders.Numbers", "numpy.dtype"])
    np.testing.assert_array_equal(back.transform(new), prepare.transform(new))


@pytest.mark.parametrize("style, estimator", [("tree", HistGradientBoostingClassifier(max_iter=3)), ("tree", RandomForestRegressor(3)),
                                              ("linear", LogisticRegression())])
def test_models_fit_on_thirty_awkward_rows(style, estimator):
    rng = np.random.default_rng(0)
    raw = pd.DataFrame({"n": rng.normal(size=30), "empty": None, "one": 1, "c": rng.choice(list("abc"), 30),
                        "none": None, "b": rng.random(30) < .5, "d": START, "nat": pd.NaT})
    kinds = {"n": "number", "empty": "number", "one": "number", "c": "category", "none": "category", "b": "boolean",
             "d": "datetime", "nat": "datetime"}
    X = model_input(raw, kinds)
    model = Pipeline([("prepare", make_preprocessor(kinds, style)), ("model", estimator)]).fit(X, np.arange(30) % 2)
    assert np.isfinite(model.predict(model_input(raw.assign(c="new", empty=5.0, none="x", nat=START), kinds))).all()


def test_unseen_levels_are_infrequent_ones():
    X = pd.DataFrame({"c": [f"{i % 40}" for i in range(400)]}, dtype=object)
    prepare = make_preprocessor({"c": "category"}).fit(X)
    assert list(prepare.get_feature_names_out())[-1].endswith("infrequent_sklearn")
    assert prepare.transform(pd.DataFrame({"c": ["unheard of"]}, dtype=object))[0].tolist() == [0.0] * 15 + [1.0]


def test_calendar_is_of_utc():
    X = pd.DataFrame({"t": pd.to_datetime(["2013-12-31T23:30:00-05:00"])})
    assert Calendar().fit(X).transform(X).tolist() == [[1.0, 1.0, 2.0, 4.0]]


def test_needs_only_numpy_pandas_and_scikit_learn():
    code = "import sys, mlops_nb.features; print(sorted({'mlflow','matplotlib','sqlalchemy','optuna','skops','fastcore','polars','dvc'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
