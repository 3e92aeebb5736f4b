"Drift: the traps that tools of this kind fall into, exactness against scipy, calibration, merging in any order."
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mlops_nb.core import MlopsError
from mlops_nb.drift import Reference, adjust, chi_square, detect_drift, jensen_shannon, ks_p_value, ks_statistic, psi


def one(x, y, **options):
    "The result of a single column"
    return detect_drift(pd.DataFrame({"x": x}), pd.DataFrame({"x": y}), **options).rows[0]


def normal(seed, n, shift=0.0):
    return np.random.default_rng(seed).normal(shift, size=n)


# Missing values and infinities

@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_missing_values_are_drift(share):
    x = normal(0, 5000)
    row = one(x, np.where(np.arange(5000) < share * 5000, np.nan, x))
    assert row["drifted"] and row["missing_drifted"] and np.isfinite([row["p_value"], row["effect"]]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_odd_value_does_not_hide_a_shift(bad):
    x = normal(0, 2000)
    row = one(x, np.append(normal(1, 2000, 5.0), bad))
    assert row["drifted"] and np.isfinite([row[k] for k in ("statistic", "p_value", "psi", "js", "wasserstein", "effect")]).all()
    assert one(np.append(x, bad), normal(1, 2000, 5.0))["drifted"]
    assert not one(np.append(x, bad), np.append(normal(1, 2000), bad))["drifted"]


def test_an_empty_column_is_a_finding_on_either_side():
    for values in (["a", "b"] * 200, [1.0, 2.0] * 200, [True, False] * 200, list(pd.date_range("2020", periods=400))):
        assert one(values, [None] * 400)["drifted"]
        assert one([None] * 400, values)["drifted"]
        assert one(values, [np.nan] * 400)["drifted"] and one([np.nan] * 400, values)["drifted"]
        assert not one([None] * 400, [None] * 400)["drifted"]


def test_none_nan_and_their_names_are_told_apart():
    row = one(pd.Series(["nan", None, np.nan, "None"] * 50, dtype=object), pd.Series(["nan", "nan", "nan", "None"] * 50, dtype=object))
    assert row["missing_reference"] == 0.5 and row["missing_current"] == 0 and row["unseen"] == []


# Levels

def test_one_unseen_level_in_a_thousand_rows_is_unremarkable_and_listed():
    row = one(["a", "b"] * 500, ["a", "b"] * 499 + ["a", "z"])
    assert abs(row["p_value"] - 0.606) < 0.001 and row["unseen"] == ["z"] and row["unseen_share"] == 0.001 and not row["drifted"]
    back = one(["a", "b"] * 499 + ["a", "z"], ["a", "b"] * 500)
    assert abs(back["p_value"] - 0.606) < 0.001 and back["vanished"] == ["z"] and back["unseen"] == []


def test_only_unseen_levels_are_drift_even_in_few_rows():
    assert one(["a", "b"] * 500, ["z"] * 500)["drifted"]
    assert one(["a", "b"] * 500, ["z"] * 6)["drifted"]


def test_five_hundred_levels_are_one_pass_and_calm_under_one_law():
    rng = np.random.default_rng(0)
    law = 1 / np.arange(1, 501)
    draw = lambda n: [f"l{k}" for k in rng.choice(500, n, p=law / law.sum())]
    row = one(draw(50_000), draw(1000))
    assert row["test"] == "chi2_pooled" and row["p_value"] > 0.001


# Calibration

def rejections(p_values):
    return np.mean(np.array(p_values) < 0.05)


@pytest.mark.parametrize("n,m", [(1000, 1000), (20_000, 1000), (40, 25)])
def test_ks_rejects_as_often_as_it_says(n, m):
    rng = np.random.default_rng(n)
    assert 0.025 <= rejections([ks_p_value(ks_statistic(np.sort(rng.random(n)), np.sort(rng.random(m))), n, m) for _ in range(400)]) <= 0.075
    ties = [ks_p_value(ks_statistic(np.sort(rng.integers(0, 5, n)), np.sort(rng.integers(0, 5, m))), n, m) for _ in range(300)]
    assert rejections(ties) <= 0.07


@pytest.mark.parametrize("n,m", [(1000, 1000), (100_000, 1000), (1000, 100_000), (3000, 750)])
@pytest.mark.parametrize("law", [[0.4, 0.3, 0.2, 0.1], [0.5, 0.4998, 0.0002], [0.9, 0.0997, 0.0003], list(1 / np.arange(1, 200))])
def test_chi_square_rejects_as_often_as_it_says(n, m, law):
    rng, law = np.random.default_rng([n, m, len(law)]), np.array(law) / np.sum(law)
    share = rejections([chi_square(rng.multinomial(n, law), rng.multinomial(m, law)).p_value for _ in range(400)])
    assert share <= 0.08
    if min(law) * m > 5: assert share >= 0.025


def test_small_tables_reject_no_more_than_they_say():
    rng = np.random.default_rng(5)
    assert rejections([chi_square(rng.multinomial(300, [0.7, 0.2, 0.1]), rng.multinomial(8, [0.7, 0.2, 0.1])).p_value for _ in range(200)]) <= 0.08


# Equality with scipy

COLUMNS = {
    "normal": lambda r, n: r.normal(size=n), "integers": lambda r, n: r.integers(-3, 40, n), "prices": lambda r, n: r.lognormal(3, 1, n).round(2),
        "zeros": lambda r, n: r.exponential(size=n) * (r.random(n) > 0.7),
    "pareto": lambda r, n: r.pareto(1.05, n), "constant": lambda r, n: np.full(n, 3.0), "huge": lambda r, n: r.integers(2**53, 2**53 + 50, n),
        "bytes": lambda r, n: r.integers(0, 255, n).astype(np.uint8),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_d_is_scipys(name):
    rng = np.random.default_rng(1)
    x, y = COLUMNS[name](rng, 9000), COLUMNS[name](rng, 2500)
    for current in (y, (y * 1.1).astype(y.dtype) if name != "huge" else y + 7):
        row, want = one(x, current), stats.ks_2samp(x, current, method="asymp")
        assert row["statistic"] == row["statistic_high"] == want.statistic
        lean = detect_drift(Reference.fit(pd.DataFrame({"x": x})), pd.DataFrame({"x": current})).rows[0]
        assert lean["statistic"] <= want.statistic <= lean["statistic_high"] <= lean["statistic"] + 3 / 4096


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=60), st.lists(st.integers(-5, 5), min_size=1, max_size=60), st.lists(st.integers(-6, 6), max_size=8))
def test_d_is_scipys_whatever_guides_the_search(x, y, points):
    x, y = np.sort(np.array(x) / 2), np.sort(np.array(y) / 2)
    assert ks_statistic(x, y, np.unique(points)) == stats.ks_2samp(x, y, method="asymp").statistic


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.05, 1))
def test_small_p_values_are_exact(n, m, d):
    h = max(1, round(d * n * m))
    x, y = np.sort(normal(n * 41 + m, n)), np.sort(normal(m * 41 + n + 5000, m, 0.5))
    want = stats.ks_2samp(x, y, method="exact")
    assert abs(ks_p_value(want.statistic, n, m) - want.pvalue) < 1e-9
    assert 0 <= ks_p_value(h / (n * m), n, m) <= 1


def test_large_p_values_follow_the_finite_law_closely():
    for n, m in ((300_000, 200_000), (25_000, 20_000)):
        size = n * m / (n + m)
        for z in np.linspace(0.3, 3, 12): assert abs(ks_p_value(z / np.sqrt(size), n, m) - stats.kstwo.sf(z / np.sqrt(size), round(size))) < 1e-5


def test_chi_square_distances_and_correction_are_scipys():
    rng = np.random.default_rng(2)
    for k in (2, 5, 60):
        a, b = rng.multinomial(40_000, np.full(k, 1 / k)), rng.multinomial(9000, np.full(k, 1 / k))
        want, got = stats.chi2_contingency([a, b], correction=False), chi_square(a, b)
        assert got.name == "chi2" and abs(got.statistic / want.statistic - 1) < 1e-12 and abs(got.p_value - want.pvalue) < 1e-12
        from scipy.spatial.distance import jensenshannon
        assert abs(jensen_shannon(a, b) - jensenshannon(a, b, base=2)) < 1e-12
    p = rng.random(30)
    assert np.allclose(adjust(p), stats.false_discovery_control(p))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=12))
def test_distances_are_finite_symmetric_and_zero_for_equals(pairs):
    a, b = np.array(pairs).T
    if not a.any() or not b.any(): return
    assert np.isfinite(psi(a, b)) and psi(a, b) >= 0 and psi(a, a) == 0 and abs(psi(a, b) - psi(b, a)) < 1e-9
    assert 0 <= jensen_shannon(a, b) <= 1 and abs(jensen_shannon(a, b) - jensen_shannon(b, a)) < 1e-12


def test_psi_between_samples_of_one_law_is_small():
    assert one(normal(0, 2000), normal(1, 2000))["psi"] < 0.05
    assert one(normal(0, 2000), np.abs(normal(1, 2000)))["psi"] < 5


# Tails, units, sizes

def test_heavy_tails_are_seen():
    rng = np.random.default_rng(3)
    p, q = 1 + rng.pareto(1.05, 50_000), 1.3 * (1 + rng.pareto(1.05, 50_000))
    row = one(p, q)
    assert row["drifted"] and 0.2 < row["effect"] < 0.3 and row["psi"] > 0.1
    assert one(stats.t(1.1).rvs(5000, random_state=0), 3 * stats.t(1.1).rvs(5000, random_state=1))["wasserstein"] > 0.5


@pytest.mark.parametrize("scale,shift", [(1e-6, 0.0), (1e-5, -3e-5), (1e9, 1e9), (2.0**-40, 0.0)])
def test_a_change_of_unit_changes_nothing(scale, shift):
    x, y = normal(0, 3000), normal(1, 2000, 0.4)
    a, b = one(x, y), one(x * scale + shift, y * scale + shift)
    for key in ("statistic", "p_value", "psi", "js"): assert a[key] == pytest.approx(b[key], rel=1e-9)
    assert a["wasserstein"] == pytest.approx(b["wasserstein"], rel=1e-5) and a["drifted"] == b["drifted"]


def test_a_million_rows_do_not_make_a_small_shift_drift():
    row = one(normal(0, 1_000_000), normal(1, 1_000_000, 0.05))
    assert row["p_value"] < 1e-100 and not row["drifted"]


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_few_rows_give_an_entry_and_no_drift(rows):
    frame = pd.DataFrame({"x": normal(0, 500), "c": ["a", "b"] * 250, "b": [True, False] * 250, "d": pd.date_range("2020", periods=500)})
    few = frame.iloc[200:400:70][:rows]
    for a, b in ((frame, few), (few, frame), (few, few)):
        report = detect_drift(a, b)
        assert not report.drifted and len(report.frame) == 4
        json.dumps(report.to_dict(), allow_nan=False)
        report._repr_html_()


# Types

def test_odd_columns_are_counted_somehow():
    import datetime
    odd = {"time": [datetime.time(1), datetime.time(2)] * 50, "date": [datetime.date(2020, 1, 1), None] * 50, "bytes": [b"a", b"b"] * 50, "list": [[1],
        [1, 2]] * 50, "mixed": [1, "x"] * 50, "complex": [1j, 2j] * 50,
           "period": pd.period_range("2020", periods=100, freq="D"), "interval": pd.cut(np.arange(100), 4), "sparse": pd.arrays.SparseArray([0.0,
               1.0] * 50), "uint64": np.array([2**64 - 1, 1] * 50, np.uint64), "half": np.ones(100, np.float16)}
    frame = pd.DataFrame(odd)
    report = detect_drift(frame, frame)
    assert len(report.rows) == len(odd) and not report.drifted and detect_drift(Reference.fit(frame), frame[:60]).share < 0.3


def test_constants():
    assert one([5.0] * 200, [6.0] * 200)["drifted"] and one([5] * 200, [4] * 200)["drifted"]
    assert not one([5.0] * 200, [5.0] * 300)["drifted"] and not one(["a"] * 200, ["a"] * 30)["drifted"]
    for row in (one([5.0] * 200, [6.0] * 200), one([0.0] * 200, [0.0] * 200)): assert np.isfinite([row["psi"], row["wasserstein"], row["js"]]).all()


def test_precision_and_storage_do_not_look_like_drift():
    x = np.random.default_rng(0).integers(0, 100, 3000) / 10
    for reference in (pd.DataFrame({"x": x}), Reference.fit(pd.DataFrame({"x": x}))):
        assert detect_drift(reference, pd.DataFrame({"x": x.astype(np.float32)})).rows[0]["statistic"] == 0
    assert detect_drift(Reference.fit(pd.DataFrame({"x": x.astype(np.float32)})), pd.DataFrame({"x": x})).rows[0]["statistic"] == 0
    whole = pd.DataFrame({"x": np.arange(300) % 7})
    for other in (whole.astype("Int64"), whole.astype(float), whole.astype("uint8"), whole.astype("int8"), whole.astype("double[pyarrow]"),
        pl.from_pandas(whole).with_columns(pl.col("x").cast(pl.Decimal(10, 2)))):
        assert detect_drift(whole, other).rows[0]["statistic"] == 0, other


def test_every_frame_gives_the_same_report():
    rng = np.random.default_rng(0)
    draw = lambda n: pd.DataFrame({"c": rng.choice(["a", "b", "c", None], n), "x": rng.normal(size=n), "t": pd.Timestamp("2020-01-01",
        tz="UTC") + pd.to_timedelta(rng.integers(0, 10**6, n), "s"), "d": pd.to_timedelta(rng.integers(0, 99, n), "s"), "b": rng.random(n) < 0.5})
    a, b = draw(2000), draw(700)
    want = detect_drift(a, b).to_dict()
    kinds = [lambda f: f.astype({"c": object}), lambda f: f.astype({"c": "category"}), lambda f: f.astype({"c": pd.ArrowDtype(pa.string())}),
        pl.from_pandas, lambda f: pl.from_pandas(f).lazy(), pa.table,
             lambda f: pa.table(f.astype({"c": "category"})), lambda f: pl.from_pandas(f).with_columns(pl.col("c").cast(pl.Categorical)),
                 lambda f: f.set_index(np.zeros(len(f)))[list(f)[::-1]]]
    for left in kinds:
        assert detect_drift(left(a), b).to_dict() == want
        assert detect_drift(a, left(b)).to_dict() == want


def test_unused_levels_numbered_levels_and_datetimes():
    a = pd.DataFrame({"x": pd.Categorical([1, 2] * 100, [1, 2, 3])})
    assert not detect_drift(a, pd.DataFrame({"x": pd.Categorical(["1", "2"] * 100)})).drifted
    days = pd.DataFrame({"d": pd.date_range("2020", periods=400)})
    assert not detect_drift(days, days.sample(200, random_state=0)).drifted
    assert detect_drift(days, days + pd.Timedelta("500D")).rows[0]["note"].endswith("all later than the reference")
    assert detect_drift(days, days.assign(d=days.d.astype("datetime64[ns]"))).rows[0]["statistic"] == 0


def test_identifiers_are_named_and_not_judged():
    frame = pd.DataFrame({"id": np.arange(500), "x": normal(0, 500)})
    report = detect_drift(frame, frame.assign(id=frame.id + 500))
    assert not report.drifted and "identifier" in report.frame.set_index("column").loc["id", "note"]


def test_text_is_compared_by_length_and_no_word_is_kept(tmp_path):
    short, long = [[f"word{i}" * k for i in range(300)] for k in (1, 4)]
    reference = Reference.fit(pd.DataFrame({"t": short}))
    reference.save(tmp_path / "r.json")
    assert "word" not in (tmp_path / "r.json").read_text()
    assert detect_drift(reference, pd.DataFrame({"t": long})).drifted and not detect_drift(reference, pd.DataFrame({"t": short})).drifted


def test_a_changed_kind_names_the_column():
    frame = pd.DataFrame({"price": [1.5, 2.5] * 30})
    for other in (frame.astype(str), frame.assign(price=pd.Timestamp("2020")), frame.assign(price=[True, "x"] * 30)):
        with pytest.raises(MlopsError, match="'price' is number"): detect_drift(frame, other)
        with pytest.raises(MlopsError, match="'price'"): detect_drift(other, frame)
        with pytest.raises(MlopsError, match="'price'"): detect_drift(Reference.fit(frame), Reference.fit(other))
        with pytest.raises(MlopsError, match="'price'"): Reference.fit(frame) + Reference.fit(other)
    with pytest.raises(MlopsError, match="no common columns"): detect_drift(frame, frame.rename(columns={"price": "cost"}))


# Merging and saving

cells = st.one_of(st.none(), st.integers(-3, 3).map(float), st.floats(-1e9, 1e9), st.sampled_from([np.inf, -np.inf, 1e-300]))
tables = st.lists(st.tuples(cells, st.sampled_from(["a", "b", "ü", None]), st.sampled_from([True, False, None])), max_size=30)


def table(rows):
    return pa.table({"x": pa.array([r[0] for r in rows], pa.float64()), "c": pa.array([r[1] for r in rows], pa.string()),
        "b": pa.array([r[2] for r in rows], pa.bool_())})


@given(tables, tables, tables, tables)
def test_addition_is_exact_in_any_order(base, a, b, c):
    cuts = Reference.fit(table(base))
    fit = lambda rows: Reference.fit(table(rows), cuts=cuts)
    if any(p.kind == "empty" for p in cuts.columns.values()): return
    assert (fit(a) + fit(b)) + fit(c) == fit(a) + (fit(b) + fit(c)) == fit(c) + fit(a) + fit(b) == fit(a + b + c)


@given(tables, tables, tables)
def test_addition_through_the_values_is_exact_too(a, b, c):
    fit = lambda rows: Reference.fit(table(rows), values=True)
    assert (fit(a) + fit(b)) + fit(c) == fit(c) + (fit(b) + fit(a)) == fit(a + b + c)


def test_other_cuts_other_columns_and_other_things_are_refused():
    a, b = (Reference.fit(pd.DataFrame({"x": normal(s, 100)})) for s in (0, 1))
    with pytest.raises(MlopsError, match="'x'.*different cuts"): a + b
    with pytest.raises(MlopsError, match="other cuts"): detect_drift(a, b)
    with pytest.raises(MlopsError, match="'y' is in only one"): a + Reference.fit(pd.DataFrame({"x": [1.0], "y": [1.0]}), cuts=None)
    with pytest.raises(MlopsError, match="DataFrame"): a + pd.DataFrame({"x": [1.0]})


def test_a_file_has_the_same_bytes_in_every_process_and_gives_the_same_answer(tmp_path):
    code = """if True:
        import sys, numpy as np, pandas as pd
        from mlops_nb.drift import Reference
        r = np.random.default_rng(0)
        Reference.fit(pd.DataFrame({'x': r.normal(size=5000), 'c': r.choice(list('abc'), 5000)})).save(sys.argv[1])"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    r = np.random.default_rng(0)
    frame = pd.DataFrame({"x": r.normal(size=5000), "c": r.choice(list("abc"), 5000)})
    current = pd.DataFrame({"x": r.normal(0.1, size=800), "c": r.choice(list("abd"), 800)})
    Reference.fit(frame).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = Reference.load(tmp_path / "a")
    assert loaded == Reference.fit(frame) and loaded.digest == Reference.fit(frame).digest
    assert detect_drift(loaded, current).to_dict() == detect_drift(Reference.fit(frame), current).to_dict() == detect_drift(loaded, current).to_dict()


def test_kept_values_survive_the_file_and_keep_the_statistic_exact(tmp_path):
    frame, current = (pd.DataFrame({"x": np.append(normal(s, 9000), [np.inf, np.nan]), "i": np.random.default_rng(s).integers(-(2**62), 2**62,
        9002)}) for s in (0, 1))
    Reference.fit(frame, values=True).save(tmp_path / "r.json")
    loaded = Reference.load(tmp_path / "r.json")
    assert loaded == Reference.fit(frame, values=True) and detect_drift(loaded, current).to_dict() == detect_drift(frame, current).to_dict()
    assert detect_drift(Reference.fit(frame), Reference.fit(current, values=True)).rows[0]["p_value"] > 0


def test_a_changed_file_is_found(tmp_path):
    path = tmp_path / "reference.json"
    Reference.fit(pd.DataFrame({"x": normal(0, 50)})).save(path)
    good = path.read_text()
    for change in (lambda t: t.replace('"rows":50', '"rows":51'), lambda t: t.replace('"at":[1,', '"at":[2,'), lambda t: t[: len(t) // 2], lambda t: "[]",
        lambda t: "", lambda t: t.replace('"version":1', '"version":"1"')):
        path.write_text(change(good))
        with pytest.raises(MlopsError, match="reference.json"): Reference.load(path)
    path.write_text(good.replace('"version":1', '"version":9'))
    with pytest.raises(MlopsError, match="newer version"): Reference.load(path)
    with pytest.raises(MlopsError, match="nowhere.json"): Reference.load(tmp_path / "nowhere.json")


# The report and the cost of the module

def test_the_page_stays_small_and_shows_the_drifted_first(tmp_path):
    rng = np.random.default_rng(0)
    wide = lambda shift: pd.DataFrame({f"<b>column {i:02}</b> & {'ä' * 30}": rng.normal(shift * (i % 5 == 0),
        size=3000) if i % 2 else rng.choice([f"level {k} <i>" for k in range(30)], 3000) for i in range(50)})
    report = detect_drift(wide(0), wide(2))
    report.save_html(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert len(page.encode()) < 300_000 and page.count("<svg") == 50 and "<b>column" not in page and "<i>" not in page
    assert not any(word in page for word in ("http://", "https://", "<script", "src="))
    assert report.frame["drifted"].tolist() == sorted(report.frame["drifted"], reverse=True)
    assert report.share == len(report.drifted_columns) / 50 and report.to_dict()["columns"][0]["column"] == report.drifted_columns[0]


def test_the_correction_keeps_false_alarms_rare():
    reports = [detect_drift(pd.DataFrame(normal(s, 200 * 20).reshape(200, 20)), pd.DataFrame(normal(s + 999, 60 * 20).reshape(60, 20)),
        threshold=0) for s in range(25)]
    assert np.mean([r.drifted for r in reports]) <= 0.16


def test_a_plot_of_each_kind():
    frame = pd.DataFrame({"x": normal(0, 100), "c": ["a", "b"] * 50, "d": pd.date_range("2020", periods=100)})
    report = detect_drift(frame, frame)
    for column in frame: assert report.plot(column).get_ylabel() == "share of rows"
    with pytest.raises(MlopsError, match="'y'"): report.plot("y")


def test_importing_it_loads_nothing_heavy():
    code = "import sys; from mlops_nb.drift import detect_drift; print(*{'sklearn', 'matplotlib', 'mlflow', 'pandas', 'scipy.stats'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
