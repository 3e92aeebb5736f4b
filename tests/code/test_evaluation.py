"Evaluation: metrics against scikit-learn on any weights and ties, intervals against their promise, decisions against luck"
import json
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from mlops_nb.core import Evaluate, Gate, MlopsError
from mlops_nb.evaluation import METRICS, answers, beside, compare, draws, estimate, evaluate, fairness, gate, importance, levels, measure, multiplicities, paired, point, slices

score = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))
rows = st.lists(st.tuples(st.booleans(), score, st.integers(0, 4)), min_size=2, max_size=40)


def columns(table):
    "Truth, scores and multiplicities; None where a metric needs two classes with weight"
    y, s, w = (np.array(c) for c in zip(*table, strict=True))
    return y.astype(int), s.astype(float), w.astype(float)


@settings(max_examples=100)
@given(rows)
def test_ranking_metrics_equal_scikit_learn_with_weights_and_ties(table):
    y, s, w = columns(table)
    got = measure(answers(y, s > 0.5, s, task="binary"))(w[None])
    positives, negatives = w[y == 1].sum(), w[y == 0].sum()
    if positives and negatives:
        assert got["roc_auc"][0] == pytest.approx(sk.roc_auc_score(y, s, sample_weight=w), abs=1e-12)
        assert got["average_precision"][0] == pytest.approx(sk.average_precision_score(y, s, sample_weight=w), abs=1e-12)
    else:
        assert np.isnan(got["roc_auc"][0])


@settings(max_examples=100)
@given(rows)
def test_other_metrics_equal_scikit_learn_with_weights(table):
    y, s, w = columns(table)
    pred, got = (s > 0.5).astype(int), measure(answers(y, (s > 0.5).astype(int), s, task="binary"))(w[None])
    if not w.sum():
        assert all(np.isnan(v[0]) for v in got.values())
        return
    assert got["accuracy"][0] == pytest.approx(sk.accuracy_score(y, pred, sample_weight=w))
    assert got["log_loss"][0] == pytest.approx(sk.log_loss(y, s, sample_weight=w, labels=[0, 1]))
    assert got["brier"][0] == pytest.approx(np.average((s - y) ** 2, weights=w), abs=1e-12)
    for name, f in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score)):
        want = f(y, pred, sample_weight=w, zero_division=np.nan)
        assert np.isnan(got[name][0]) if np.isnan(want) else got[name][0] == pytest.approx(want)


@settings(max_examples=100)
@given(rows, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(table, random):
    shuffled = list(table)
    random.shuffle(shuffled)
    one, two = (point(answers(y, s > 0.5, s, task="binary")) for y, s, _ in (columns(table), columns(shuffled)))
    assert one == pytest.approx(two, abs=1e-12, nan_ok=True)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.integers(0, 3)), min_size=1, max_size=30))
def test_regression_metrics_are_those_of_repeated_rows(table):
    y, p, w = (np.array(c, dtype=float) for c in zip(*table, strict=True))
    got, drawn = measure(answers(y, p, task="regression"))(w[None]), np.repeat(np.arange(len(y)), w.astype(int))
    if not len(drawn):
        assert all(np.isnan(v[0]) for v in got.values())
        return
    assert got["rmse"][0] == pytest.approx(sk.root_mean_squared_error(y[drawn], p[drawn]), abs=1e-9)
    assert got["mae"][0] == pytest.approx(sk.mean_absolute_error(y[drawn], p[drawn]), abs=1e-9)
    assert got["medae"][0] == pytest.approx(sk.median_absolute_error(y[drawn], p[drawn]), abs=1e-9)
    if len(drawn) > 1 and np.var(y[drawn]) > 1e-6 * max(1, np.mean((y - np.median(y)) ** 2)):
        assert got["r2"][0] == pytest.approx(sk.r2_score(y[drawn], p[drawn]), rel=1e-6, abs=1e-6)


@settings(max_examples=60)
@given(st.integers(2, 5), st.integers(1, 40), st.integers(0, 10**6))
def test_multiclass_metrics_equal_scikit_learn_whatever_classes_the_rows_have(k, n, seed):
    rng = np.random.default_rng(seed)
    y, p = rng.integers(0, k, n), rng.dirichlet(np.ones(k), n)
    got = point(answers(y, p.argmax(1), p, task="multiclass", classes=list(range(k))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert got["accuracy"] == pytest.approx(sk.accuracy_score(y, p.argmax(1)))
        assert got["f1_macro"] == pytest.approx(sk.f1_score(y, p.argmax(1), average="macro"))
        assert got["log_loss"] == pytest.approx(sk.log_loss(y, p, labels=list(range(k))))
        if len(set(y)) > 1:
            assert got["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, p.argmax(1)))
            assert got["roc_auc_ovr"] == pytest.approx(np.mean([sk.roc_auc_score(y == c, p[:, c]) for c in sorted(set(y))]))
        else:
            assert np.isnan(got["roc_auc_ovr"])


anything = st.one_of(st.none(), st.booleans(), st.integers(-(10**6), 10**6), st.floats(), st.text(max_size=4), st.dates(), st.sampled_from(["<b>", "", "(missing)"]))


@settings(max_examples=150)
@given(st.lists(anything, max_size=60))
def test_any_column_can_be_cut_into_levels(values):
    column = pd.Series(values, dtype=object)
    cut = levels(column)
    assert len(cut) == len(values) and not cut.isna().any() and len(cut.categories) <= 22


@settings(max_examples=30)
@given(st.sampled_from(["binary", "multiclass", "regression"]), st.integers(0, 12), st.booleans(), st.integers(0, 10**6))
def test_few_rows_give_a_report_not_an_exception(tmp_path, task, n, scored, seed):
    rng = np.random.default_rng(seed)
    k = 2 if task == "binary" else 3
    y = rng.normal(size=n) if task == "regression" else rng.integers(0, rng.integers(1, k + 1), n)
    pred = rng.normal(size=n) if task == "regression" else rng.integers(0, k, n)
    s = rng.dirichlet(np.ones(k), n) if scored and task != "regression" else None
    frame = pd.DataFrame({"a": rng.choice(["x", None], n), "b": rng.normal(size=n)})
    config = Evaluate(bootstrap=20, slices=["a", "b"], fairness=["a"])
    done = evaluate(y, pred, s, task=task, classes=None if task == "regression" else list(range(k)), config=config, frame=frame, seed=seed)
    assert list(done.metrics) == list(METRICS[task])
    for m in done.metrics.values():
        assert m["value"] is not None or m["note"]
        assert m["low"] is None or m["low"] <= m["high"]
    assert json.loads(json.dumps(done.to_dict(), allow_nan=False)) == done.to_dict()
    done.save_html(tmp_path / "e.html", dummy=done, gate=gate(done, done))
    assert len(beside(done, done)) == len(done.frame)
    assert not gate(done, done)["passed"]                       # nothing is better than itself


def test_intervals_hold_what_they_promise():
    "95 % of them hold the true value, for metrics of each task"

    def binary(rng, n=250):
        x = rng.normal(size=n)
        p = 1 / (1 + np.exp(1 - x))
        return answers(rng.random(n) < p, p > 0.5, p, task="binary")

    def regression(rng, n=250):
        x = rng.normal(size=n)
        return answers(x + rng.normal(size=n), x, task="regression")

    for make, names in ((binary, ["roc_auc", "log_loss", "ece"]), (regression, ["rmse", "mae", "medae"])):
        true = point(make(np.random.default_rng(0), 100_000), names) | {"ece": 0.0}
        got = [estimate(make(np.random.default_rng([1, i])), names, resamples=150, seed=i) for i in range(150)]
        for m in names:
            held = np.mean([e[m]["low"] <= true[m] <= e[m]["high"] for e in got])
            assert 0.89 <= held <= 0.995, (m, held)


def test_a_model_without_knowledge_rarely_passes_the_gate():
    def passes(i, n=12):
        rng = np.random.default_rng([n, i])
        y, s = np.arange(n) % 3 == 0, rng.random(n)
        model, dummy = (evaluate(y, v > 0.5, v, task="binary", config=Evaluate(bootstrap=100)) for v in (s, np.full(n, 0.3)))
        return gate(model, dummy)["passed"]

    assert np.mean([passes(i) for i in range(50)]) <= 0.09


@pytest.mark.parametrize("worse, most, least", [(0.03, 0.07, 0.0), (0.06, 0.01, 0.0), (0.0, 1.0, 0.6)])
def test_a_worse_candidate_is_rarely_accepted(worse, most, least):
    def accepted(i, n=600):
        rng = np.random.default_rng([int(worse * 1000), i])
        champion, unlike = rng.random(n) > 0.2, rng.random(n) < 0.1
        candidate = np.where(unlike, rng.random(n) > 0.2 + worse * 10, champion)
        return compare(np.ones(n, dtype=int), champion, candidate, task="binary", metric="accuracy", margin=0.03, classes=[0, 1], resamples=200)["accepted"]

    assert least <= np.mean([accepted(i) for i in range(120)]) <= most


def test_a_paired_difference_turns_sign_with_the_models():
    rng = np.random.default_rng(0)
    y, a, b = rng.random(300) < 0.4, rng.random(300), rng.random(300)
    one, two = (answers(y, s > 0.5, s, task="binary") for s in (a, b))
    for metric in METRICS["binary"]:
        there, back = paired(one, two, metric, seed=3), paired(two, one, metric, seed=3)
        assert there["difference"] == pytest.approx(-back["difference"])
        assert (there["low"], there["high"]) == pytest.approx((-back["high"], -back["low"]))


def test_slices_without_a_difference_are_not_called_worse():
    def flagged(i):
        rng = np.random.default_rng(i)
        p = rng.beta(2, 4, 1500)
        a = answers(rng.random(1500) < p, p > 0.5, p, task="binary")
        return slices(a, pd.DataFrame({"s": rng.integers(0, 12, 1500)}), Evaluate(slices=["s"], bootstrap=100), i)["worse"].any()

    assert np.mean([flagged(i) for i in range(25)]) <= 0.16


def test_resamples_are_reproducible_and_do_not_depend_on_the_metrics_asked_for():
    rng = np.random.default_rng(0)
    a = answers(rng.random(400) < 0.3, rng.random(400) < 0.3, rng.random(400), task="binary")
    assert (draws(a, ["brier"], seed=1)["brier"] == draws(a, seed=1)["brier"]).all()
    assert (draws(a, ["brier"], seed=1)["brier"] != draws(a, ["brier"], seed=2)["brier"]).any()
    blocks = list(multiplicities(90_000, 5, np.random.default_rng(0)))
    assert len(blocks) == 3 and all((b.sum(axis=1) == 90_000).all() for b in blocks)


def test_labels_of_any_type_mean_the_same():
    rng = np.random.default_rng(0)
    y, s = rng.random(300) < 0.4, rng.random(300)
    want = evaluate(y, s > 0.5, s, task="binary").metrics
    for no, yes in ((0, 1), ("no", "yes"), (0.0, 1.0), (1, 2)):
        got = evaluate(np.where(y, yes, no), np.where(s > 0.5, yes, no), np.c_[1 - s, s], task="binary", classes=[no, yes])
        assert got.metrics == want
    assert evaluate(pd.Categorical(np.where(y, "b", "a")), pd.Series(np.where(s > 0.5, "b", "a"), dtype="string"), s, task="binary").metrics == want


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: evaluate([0, 1], [0, 1, 1], task="binary"), "2 true values, but 3 predictions"),
        (lambda: evaluate([0, 1], [0, 1], [0.1], task="binary"), "2 true values, but 1 scores"),
        (lambda: evaluate([0, 1, 2], [0, 1, 2], task="binary"), "base.task multiclass"),
        (lambda: evaluate([0, np.nan], [0, 1], task="binary"), "the target: 1 of 2"),
        (lambda: evaluate([0, 1], [0, 1], [0.1, np.nan], task="binary"), "the scores: 1 of 2"),
        (lambda: evaluate([1.0, 2.0], ["a", "b"], task="regression"), "the predictions: numbers are wanted"),
        (lambda: evaluate([0, 1], [0, 1], task="binary", config=Evaluate(slices=["shoop"]), frame=pd.DataFrame({"shop": [1, 2]})), "evaluate.slices: no column 'shoop'; did you mean 'shop'"),
        (lambda: gate(evaluate([0, 1], [0, 1], task="binary"), None, Gate(metrics={"acuracy": {"min": 1}})), "gate.metrics.acuracy: binary has no metric 'acuracy'; did you mean 'accuracy'"),
        (lambda: compare([1.0], [1.0], [1.0], task="regression", metric="roc_auc"), "register.metric: regression has no metric"),
        (lambda: importance(None, pd.DataFrame({"a": [1]}), [1, 2], task="binary"), "1 rows of inputs, but 2"),
    ],
)
def test_wrong_calls_say_what_is_wrong(call, message):
    with pytest.raises(MlopsError) as said:
        call()
    assert message in str(said.value) and len(str(said.value).splitlines()) == 1


def test_importance_takes_columns_of_any_type_and_name():
    class Rule:
        classes_ = np.array(["no", "yes"])

        def predict_proba(self, X):
            assert X["kind"].dtype == "category" and str(X["day"].dtype).startswith("datetime64") and X[7].dtype == "Int64"
            p = (X["kind"] == "b").to_numpy() * 0.8 + 0.1
            return np.c_[1 - p, p]

    rng = np.random.default_rng(0)
    kind = pd.Categorical(rng.choice(["a", "b"], 200))
    X = pd.DataFrame({"kind": kind, "day": pd.Timestamp("2024-01-01"), 7: pd.array([1, None] * 100, dtype="Int64"), "a, \"b\"": [None] * 200})
    got = importance(Rule(), X, np.where(kind == "b", "yes", "no"), task="binary")
    assert got["feature"][0] == "kind" and got["importance"][0] > 0.3 and (got["importance"][1:] == 0).all()


def test_fairness_without_fairlearn_says_what_to_install(monkeypatch):
    import builtins

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *a, **k: (_ for _ in ()).throw(ImportError(name)) if name.startswith("fairlearn") else real(name, *a, **k))
    a = answers([0, 1] * 20, [0, 1] * 20, task="binary")
    with pytest.raises(MlopsError, match="mlops-nb\\[pipeline\\]"):
        fairness(a, pd.DataFrame({"g": ["x", "y"] * 20}), Evaluate(fairness=["g"]))
