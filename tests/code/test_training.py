"Training: what a split keeps, searches that survive, records that are closed, the same bits twice"
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_nb.core import Base, MlopsError, Search, Split, Train
from mlops_nb.training import PARTS, Tracker, answers_of, check_space, make_estimator, make_model, rows_digest, score_of, search_params, split_rows, train

share = st.floats(0.05, 0.45)
count = lambda parts: np.array([(parts == p).sum() for p in PARTS])


def wanted(split, n):
    return np.array([1 - split.validation - split.test, split.validation, split.test]) * n


# ---- splits


@given(st.integers(3, 200), share, share, st.integers(0, 3))
def test_a_random_split_has_the_shares_within_a_row(n, validation, test, seed):
    split = Split(method="random", validation=validation, test=test)
    parts = split_rows(pd.DataFrame({"x": range(n)}), split, seed=seed)
    assert len(parts) == n and set(parts) == set(PARTS)
    assert (abs(count(parts) - wanted(split, n)) <= 1 + 3 * (n < 20)).all()
    assert (parts == split_rows(pd.DataFrame({"x": range(n)}), split, seed=seed)).all()


@given(st.lists(st.integers(0, 12), min_size=3, max_size=80), share, share)
def test_a_split_in_time_tears_no_moment_and_mixes_no_order(moments, validation, test):
    frame = pd.DataFrame({"t": pd.Timestamp("2024-01-01") + pd.to_timedelta(moments, unit="h")})
    split = Split(validation=validation, test=test)
    if frame.t.nunique() < 3:
        with pytest.raises(MlopsError, match="moments in column 't'"):
            split_rows(frame, split, time="t")
        return
    parts = split_rows(frame, split, time="t")
    assert set(parts) == set(PARTS)
    for early, late in zip(PARTS, PARTS[1:]):
        assert frame.t[parts == early].max() < frame.t[parts == late].min()
    shuffled = frame.sample(frac=1, random_state=0)
    assert (split_rows(shuffled, split, time="t") == parts[shuffled.index]).all()
    as_text = frame.assign(t=frame.t.dt.strftime("%Y-%m-%dT%H:%M"))
    assert (split_rows(as_text, split, time="t") == parts).all()


@given(st.integers(0, 999), st.integers(60, 300), st.integers(20, 60))
def test_a_cut_in_time_is_off_by_at_most_half_a_moment(seed, n, k):
    frame, split = pd.DataFrame({"t": np.random.default_rng(seed).integers(0, k, n)}), Split()
    parts, largest = split_rows(frame, split, time="t"), frame.t.value_counts().max()
    assert abs((parts == "train").sum() - 0.7 * n) <= largest / 2 + 1e-9
    assert abs((parts == "test").sum() - 0.15 * n) <= largest / 2 + 1e-9


@given(st.lists(st.one_of(st.none(), st.integers(0, 9)), min_size=3, max_size=80), st.integers(0, 3))
def test_a_group_is_in_one_part(groups, seed):
    frame = pd.DataFrame({"g": pd.Series(groups, dtype=object)})
    if frame.g.nunique(dropna=False) < 3:
        with pytest.raises(MlopsError, match="groups in column 'g'"):
            split_rows(frame, Split(method="grouped", group="g"), seed=seed)
        return
    parts = split_rows(frame, Split(method="grouped", group="g"), seed=seed)
    assert set(parts) == set(PARTS)
    assert frame.assign(part=parts).groupby("g", dropna=False).part.nunique().max() == 1


@given(st.dictionaries(st.sampled_from("abcdefg"), st.integers(1, 60), min_size=2), share, share, st.integers(0, 3))
def test_a_stratified_split_shares_out_every_class(sizes, validation, test, seed):
    y = pd.Series([c for c, n in sizes.items() for _ in range(n)])
    split = Split(method="stratified", validation=validation, test=test)
    try:
        parts = split_rows(pd.DataFrame({"y": y}), split, target="y", task="multiclass", seed=seed)
    except MlopsError as e:
        assert ("leave none" in str(e) and max(sizes.values()) < 3) or len(y) < 3
        return
    for c, n in sizes.items():
        own = count(parts[y == c])
        assert own.sum() == n and own[0] >= 1
        assert n < 3 or (own >= 1).all()
        assert (abs(own - wanted(split, n))[1:] <= 1 + (n < 6)).all()
    assert (abs(count(parts) - wanted(split, len(y)))[1:] <= 1 + len(sizes)).all()


def test_thirty_rows_with_few_positives_have_some_in_each_part():
    y = pd.Series([True] * 4 + [False] * 26)
    parts = split_rows(pd.DataFrame({"y": y}), Split(method="stratified"), target="y")
    assert [int(y[parts == p].sum()) for p in PARTS] == [2, 1, 1]


@pytest.mark.parametrize(
    "options, split, message",
    [
        ({}, Split(), "train.split.method"),
        ({"time": "tt"}, Split(), "did you mean 't'"),
        ({"time": "hole"}, Split(), "column 'hole' is missing in 1 rows"),
        ({"time": "word"}, Split(), "column 'word'"),
        ({"target": "one"}, Split(method="random"), "target 'one': all rows to train on have the same value"),
        ({"target": "late", "time": "t"}, Split(), "target 'late'"),
        ({"target": "tt"}, Split(method="random"), "no column 'tt'"),
        ({}, Split(method="stratified"), "shares out classes"),
        ({}, Split(method="grouped", group="gg"), "train.split.group"),
    ],
)
def test_what_cannot_be_split_is_named(options, split, message):
    frame = pd.DataFrame({"t": range(20), "hole": [None, *range(19)], "word": ["noon"] * 20, "one": 1, "late": [i > 15 for i in range(20)]})
    with pytest.raises(MlopsError, match=message):
        split_rows(frame, split, **options)


# ---- answers and models


@given(st.lists(st.booleans(), min_size=2, max_size=30))
def test_labels_keep_their_meaning_in_every_storage_type(values):
    plain = answers_of(pd.Series(values), "binary")
    assert plain.dtype == bool
    for dtype in ("boolean", object, "category"):
        assert (answers_of(pd.Series(values, dtype=dtype), "binary") == plain).all()
    for dtype in ("int8", "float64", "Int64", "category"):
        out = answers_of(pd.Series(np.array(values, dtype=int)).astype(dtype), "binary")
        assert out.dtype == np.int64 and (out == plain).all()
    words = pd.Series(np.where(values, "yes", "no"))
    for dtype in ("str", object, "category"):
        assert ((answers_of(words.astype(dtype), "binary") == "yes") == plain).all()


@pytest.mark.parametrize("labels", [[False, True], [0, 1], [3, 7], ["no", "yes"], ["0", "1"]])
def test_the_larger_label_is_the_positive_one(labels):
    X, late = np.arange(40.0).reshape(-1, 1), np.arange(40) >= 20
    y = answers_of(pd.Series([labels[int(v)] for v in late]), "binary")
    model = make_estimator("logistic_regression", {}, "binary").fit(X, y)
    assert score_of(model, X, y, "roc_auc") == 1 and score_of(model, X, y, "f1") == 1
    assert model.classes_[1] == labels[1]


def test_every_named_estimator_trains_on_awkward_columns():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"n": np.where(rng.random(60) < 0.3, np.nan, rng.normal(size=60)), "c": pd.Series(rng.choice(["a", "b", None], 60), dtype=object),
                          "d": pd.date_range("2024-01-01", periods=60).astype("datetime64[us]"), "empty": np.nan, "same": 1.0})
    kinds = {"n": "number", "c": "category", "d": "datetime", "empty": "number", "same": "number"}
    for name, task in [("hist_gradient_boosting", "binary"), ("random_forest", "multiclass"), ("logistic_regression", "binary"), ("dummy", "binary"), ("linear", "regression"),
                       ("hist_gradient_boosting", "regression"), ("random_forest", "regression"), ("sklearn.neighbors.KNeighborsClassifier", "binary")]:
        y = {"binary": rng.random(60) > 0.5, "multiclass": rng.choice(list("abc"), 60), "regression": rng.normal(size=60)}[task]
        model = make_model(kinds, name, {"n_estimators": 5} if name == "random_forest" else {}, task).fit(frame, y)
        assert len(model.predict(frame)) == 60


def test_rows_are_known_by_their_content():
    frame, y, parts = pd.DataFrame({"a": [1.0, 2.0], "b": ["x", None]}), pd.Series([True, False], name="y"), np.array(["train", "test"], dtype=object)
    same = rows_digest(frame.set_axis([5, 6]), y, parts)
    assert same == rows_digest(frame, y, parts)
    others = [rows_digest(frame.rename(columns={"a": "A"}), y, parts), rows_digest(frame, ~y, parts), rows_digest(frame, y, parts[::-1]), rows_digest(frame.assign(a=[1.0, 3.0]), y, parts)]
    assert len({same, *others}) == 5


# ---- the search

SPACE = {"x": {"low": 0.0, "high": 1.0}, "k": {"low": 1, "high": 9}, "c": ["a", "b", None]}


def valley(trial, p):
    if p["k"] == 9:
        raise RuntimeError("nine")
    return (p["x"] - 0.4) ** 2 + abs(p["k"] - 3) + (p["c"] == "a")


ranges = st.fixed_dictionaries({"low": st.integers(-3, 9), "high": st.integers(-3, 9)}, optional={"log": st.booleans(), "step": st.one_of(st.none(), st.integers(-1, 3))})
decimals = st.fixed_dictionaries({"low": st.floats(-2, 4), "high": st.floats(-2, 4)}, optional={"log": st.booleans(), "step": st.floats(0, 1)})


@given(st.one_of(ranges, decimals, st.lists(st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3)), max_size=4)), st.sampled_from(["tpe", "random", "grid"]))
def test_a_space_is_refused_by_name_or_can_be_searched(spec, method):
    try:
        check_space({"p": spec})
    except MlopsError as e:
        assert "train.search.space.p" in str(e)
        return
    seen = []
    search_params(lambda t, p: seen.append(p["p"]) or 0.0, Search(method=method, n_trials=4, space={"p": spec}), name="s")
    for v in seen:
        assert v in spec if isinstance(spec, list) else spec["low"] <= v <= spec["high"]
    if isinstance(spec, dict) and all(isinstance(spec.get(k) or 0, int) for k in ("low", "high", "step")):
        assert all(isinstance(v, int) for v in seen)


@pytest.mark.parametrize("method", ["tpe", "random", "grid"])
def test_every_method_repeats_itself(method):
    once, again = (search_params(valley, Search(method=method, n_trials=12, space=SPACE), name="s", seed=3, lower=True) for _ in range(2))
    other = search_params(valley, Search(method=method, n_trials=12, space=SPACE), name="s", seed=4, lower=True)[1]
    assert once[0] == again[0] and once[1].equals(again[1]) and not once[1].equals(other)
    assert once[1].number.tolist() == list(range(12))


WORKER = """
import json, sys, time
from mlops_nb.core import Search
from mlops_nb.training.search import search_params
storage, method, pause, space = sys.argv[1], sys.argv[2], float(sys.argv[3]), json.loads(sys.argv[4])
def valley(trial, p):
    time.sleep(pause)
    if p["k"] == 9: raise RuntimeError("nine")
    return (p["x"] - 0.4) ** 2 + abs(p["k"] - 3) + (p["c"] == "a")
best, trials = search_params(valley, Search(method=method, n_trials=10, space=space, storage=storage), name="s", seed=3, lower=True)
print(json.dumps(best))
"""


def worker(storage, method, pause):
    return subprocess.Popen([sys.executable, "-c", WORKER, str(storage), method, str(pause), json.dumps(SPACE)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("method", ["tpe", "grid"])
def test_a_killed_search_goes_on_as_if_it_had_not_been_killed(tmp_path, method):
    log = tmp_path / "a folder" / "search.log"
    killed = worker(log, method, 0.2)
    said = [killed.stdout.readline() for _ in range(4)]
    time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert "trial 4 of 10" in said[-1]
    setting = Search(method=method, n_trials=10, space=SPACE)
    calls = []
    best, trials = search_params(lambda t, p: calls.append(p) or valley(t, p), setting.model_copy(update={"storage": str(log)}), name="s", seed=3, lower=True)
    whole_best, whole = search_params(valley, setting, name="s", seed=3, lower=True)
    assert trials.equals(whole) and best == whole_best
    assert len(calls) <= 6


def test_two_workers_share_one_search(tmp_path):
    both = [worker(tmp_path / "search.log", "grid", 0.1) for _ in range(2)]
    answers = [json.loads(w.communicate(timeout=600)[0].splitlines()[-1]) for w in both]
    assert [w.returncode for w in both] == [0, 0]
    best, trials = search_params(valley, Search(method="grid", n_trials=10, space=SPACE, storage=str(tmp_path / "search.log")), name="s", seed=3, lower=True)
    assert best in answers
    assert 10 <= len(trials) <= 11 and trials.number.tolist() == list(range(len(trials)))
    assert not trials.drop(columns=["number", "score", "state", "error"]).duplicated().any()


def test_a_password_in_the_environment_is_not_shown(monkeypatch):
    monkeypatch.setenv("SEARCH_PASSWORD", "opensesame")
    with pytest.raises(MlopsError) as e:
        search_params(valley, Search(n_trials=1, space=SPACE, storage="nodriver://me:$SEARCH_PASSWORD@host/db"), name="s")
    assert "opensesame" not in str(e.value) and "train.search.storage" in str(e.value)


# ---- training

BASE = Base(name="toy", seed=5)
BOOSTED = {"threads": 1, "estimator": "hist_gradient_boosting", "params": {"early_stopping": False}, "search": {"n_trials": 7, "space": {"learning_rate": {"low": 0.01, "high": 0.5, "log": True}, "max_iter": {"low": 4, "high": 12}}}}
CONFIGS = {
    "boosted": BOOSTED,
    "forest": {"estimator": "random_forest", "params": {"class_weight": "balanced", "max_depth": 4}, "search": {"n_trials": 2, "method": "random", "space": {"n_estimators": {"low": 5, "high": 9}}}},
    "linear": {"estimator": "logistic_regression", "search": {"n_trials": 3, "space": {"C": {"low": 0.01, "high": 10.0, "log": True}}}},
}


def toy(n=300):
    rng = np.random.default_rng(1)
    X = pd.DataFrame({"a": rng.normal(size=n), "b": np.where(rng.random(n) < 0.2, np.nan, rng.normal(size=n)), "c": pd.Series(rng.choice(["u", "v", None], n), dtype=object)})
    y = pd.Series(X.a + (X.c == "u") + rng.normal(size=n) > 0.5, name="y")
    return X, y, {"a": "number", "b": "number", "c": "category"}


def fit_toy(config, **options):
    X, y, kinds = toy()
    config = Train.model_validate({"split": {"method": "stratified"}, **config})
    parts = split_rows(y.to_frame(), config.split, target="y", seed=BASE.seed)
    return train(X, y, parts, kinds, base=BASE, config=config, **options)


def fingerprint(config):
    done = fit_toy(config)
    return [done.trials.to_csv(), done.score, done.model.predict_proba(toy()[0]).tobytes().hex()[:4000]]


def test_two_processes_on_different_numbers_of_cores_agree_to_the_last_bit():
    code = """if True:
        import json, os, sys
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        sys.path.insert(0, sys.argv[1])
        from test_training import CONFIGS, fingerprint
        print(json.dumps({name: fingerprint(config) for name, config in CONFIGS.items()}))"""
    other = subprocess.run([sys.executable, "-c", code, os.path.dirname(__file__)], capture_output=True, text=True, check=True).stdout
    assert json.loads(other.splitlines()[-1]) == {name: fingerprint({**config, "threads": 2}) for name, config in CONFIGS.items()}


def test_the_score_is_of_the_model_that_is_kept():
    done, (X, y, _) = fit_toy(BOOSTED), toy()
    parts = split_rows(y.to_frame(), Split(method="stratified"), target="y", seed=BASE.seed)
    assert done.score == score_of(done.model, X[parts == "validation"], y[parts == "validation"].to_numpy(), "roc_auc") == done.trials.score.max()
    assert set(done.params) == {"early_stopping", "learning_rate", "max_iter"} and isinstance(done.params["max_iter"], int)


def test_pruning_saves_trees_and_does_not_change_what_is_finished():
    space = {"learning_rate": {"low": 0.001, "high": 0.5, "log": True}, "max_iter": [16]}
    some = fit_toy({**BOOSTED, "search": {"n_trials": 12, "method": "random", "space": space}}).trials
    every = fit_toy({**BOOSTED, "search": {"n_trials": 12, "method": "random", "space": space, "pruning": False}}).trials
    assert (some.state == "pruned").any() and (every.state == "done").all()
    finished = some.state == "done"
    assert (some.score[finished] == every.score[finished]).all()
    assert some.score.max() == every.score.max()


def test_another_question_is_another_study(tmp_path):
    storage = str(tmp_path / "search.log")
    asked = lambda **changes: fit_toy({**BOOSTED, **changes, "search": {**BOOSTED["search"], "n_trials": 2, "storage": storage, **changes.get("search", {})}})
    first, other = asked(), asked(params={"early_stopping": False, "max_leaf_nodes": 4})
    assert len(first.trials) == len(other.trials) == 2 and first.score != other.score
    more = asked(search={"n_trials": 3})
    assert len(more.trials) == 3 and more.trials.head(2).equals(first.trials)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "A project's folder with a store, which three trackers make at once"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        root = tmp_path_factory.mktemp("with space")
        with ThreadPoolExecutor(3) as pool:
            trackers = list(pool.map(lambda _: Tracker("toy", root), range(3)))
        assert len({t.experiment for t in trackers}) == 1
        yield root


def test_a_training_is_recorded(store):
    done = fit_toy({**CONFIGS["linear"], "search": {"method": "grid", "space": {"C": [-1.0, 0.1, 1.0]}}}, tracker=(tracker := Tracker("toy", store)))
    runs = {r.info.run_id: r for r in tracker.client.search_runs([tracker.experiment])}
    parent, children = runs[done.run_id], [r for r in runs.values() if r.data.tags.get("mlflow.parentRunId") == done.run_id]
    assert sorted(r.info.status for r in children) == ["FAILED", "FINISHED", "FINISHED"]
    assert parent.data.metrics["roc_auc"] == done.score and parent.data.tags["data_hash"] == done.rows_digest and parent.data.tags["seed"] == "5"
    assert {r.data.params["C"] for r in children} == {"-1.0", "0.1", "1.0"} and parent.data.params["best.C"] == str(done.params["C"])


def test_what_stops_is_closed(store, monkeypatch):
    tracker = Tracker("toy", store)
    said = lambda: tracker.client.get_run(tracker.run_id)
    with pytest.raises(MlopsError, match="none of 1 trials"):
        fit_toy({**CONFIGS["linear"], "search": {"n_trials": 1, "space": {"C": [-1.0]}}}, tracker=tracker)
    assert said().info.status == "FAILED" and "none of 1 trials" in said().data.tags["error"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tracker, "trial", lambda **record: (_ for _ in ()).throw(KeyboardInterrupt))
        fit_toy(CONFIGS["linear"], tracker=tracker)
    assert said().info.status == "KILLED"
    dead = subprocess.run([sys.executable, "-c", "from mlops_nb.training.tracking import signature; print(signature())"], capture_output=True, text=True).stdout.strip()
    with monkeypatch.context() as patch:
        patch.setattr("mlops_nb.training.tracking.signature", lambda: dead)
        tracker.start({}, {})
    left = tracker.run_id
    assert said().info.status == "RUNNING"
    fit_toy(CONFIGS["linear"], tracker=tracker)
    assert tracker.client.get_run(left).info.status == "KILLED"
    assert not tracker.client.search_runs([tracker.experiment], "attributes.status = 'RUNNING'")
