"Bundles and models as files: the same bytes in every process, every change found, nothing loaded that was not packaged."
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OneHotEncoder, TargetEncoder

from mlops_nb.bundle import MANIFEST, load_bundle, load_model, render_manifest, save_model, to_tar, verify_bundle
from mlops_nb.bundle.files import _is_inside
from mlops_nb.core import MlopsError, digest
from mlops_nb.features import make_preprocessor, model_input
from mlops_nb.packaging import package

KINDS = {"fare": "number", "town": "category", "sold": "datetime", "child": "boolean"}
MARK = "mark-of-the-pickle"


def rows(n=300):
    rng = np.random.default_rng(0)
    raw = pd.DataFrame({"fare": rng.gamma(2, 30, n), "town": rng.choice(["Cork", "Brest", "Ulm", None], n), "child": rng.choice([0.0, 1.0, np.nan], n),
                        "sold": pd.Timestamp("2012-04-01") + pd.to_timedelta(rng.integers(0, 999, n), unit="h")})
    raw.loc[::7, "fare"] = np.nan
    return model_input(raw, KINDS), np.where(raw.fare.fillna(50) + 30 * (raw.town == "Cork") + rng.normal(0, 20, n) > 80, "late", "on time")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A small bundle, its model and its rows"
    x, y = rows()
    model = Pipeline([("prepare", make_preprocessor(KINDS)), ("model", HistGradientBoostingClassifier(max_iter=3, random_state=0))]).fit(x, y)
    metadata = {"metrics": {"auc": {"value": 0.7, "low": 0.6, "high": 0.8}}, "gate": {"passed": True, "reasons": []}, "target": "boarding"}
    return package(model, tmp_path_factory.mktemp("made") / "bundle", name="boarding", sample=x, metadata=metadata), model, x


@pytest.fixture
def bundle(made, tmp_path):
    "A copy to spoil"
    return shutil.copytree(made[0].path, tmp_path / "bundle")


def write_models(out):
    "Fit four models and write each as a file, and one as a bundle"
    x, y = rows()
    mixed = ColumnTransformer([("one", OneHotEncoder(handle_unknown="ignore"), ["town"]), ("target", TargetEncoder(cv=StratifiedKFold(3)), ["town"])], sparse_threshold=0)
    models = {"trees": (make_preprocessor(KINDS), HistGradientBoostingClassifier(max_iter=5, random_state=0)),
              "encoded": (mixed, HistGradientBoostingClassifier(max_iter=5, random_state=0)),
              "linear": (make_preprocessor(KINDS, "linear"), LogisticRegression(class_weight={"late": 2, "on time": 1})),
              "forest": (make_preprocessor(KINDS, "linear"), RandomForestClassifier(8, max_depth=5, random_state=0, n_jobs=2))}
    for name, (prepare, last) in models.items():
        model = Pipeline([("prepare", prepare), ("model", last)]).fit(x, y)
        model.words_ = {"alpha", "beta", "gamma", "delta"}
        save_model(model, out / f"{name}.skops")
        again = load_model(out / f"{name}.skops")
        assert np.allclose(again.predict_proba(x), model.predict_proba(x), rtol=0, atol=1e-12)
        save_model(again, out / f"{name}-again.skops")
    package(model, out / "bundle", name="forest", sample=x)


def test_the_same_model_gives_the_same_bytes_in_two_processes(tmp_path):
    program = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import pathlib, test_bundle; test_bundle.write_models(pathlib.Path(sys.argv[1]))"
    (tmp_path / "other").mkdir()
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "other")], env={**os.environ, "PYTHONHASHSEED": "77"})
    (tmp_path / "here").mkdir()
    write_models(tmp_path / "here")
    assert other.wait(300) == 0
    assert digest(tmp_path / "here") == digest(tmp_path / "other")
    for file in (tmp_path / "here").glob("*-again.skops"):  # also what was read and written again
        assert digest(file) == digest(file.with_name(file.name.replace("-again", "")))


def test_the_bundle_answers_as_the_model_does(made):
    bundle, model, x = made
    assert np.allclose(bundle.predict_proba(x), model.predict_proba(x), rtol=0, atol=1e-15)
    assert np.array_equal(bundle.predict(x.sample(frac=1, axis=1, random_state=0).assign(more=1)), model.predict(x))
    spelled = json.loads(x.to_json(orient="records", date_format="iso"))
    assert np.array_equal(bundle.predict(spelled), model.predict(x))
    assert bundle.predict(bundle.input_example).shape == (1,)
    assert bundle.compiled and bundle.proof["reason"] is None


def test_every_flipped_byte_is_found(bundle):
    for file in sorted(p for p in bundle.iterdir()):
        good = file.read_bytes()
        step = 3 if file.name == MANIFEST else max(1, len(good) // 60)
        for i in range(0, len(good), step):
            file.write_bytes(good[:i] + bytes([good[i] ^ (1, 32, 128)[i % 3]]) + good[i + 1:])
            with pytest.raises(MlopsError, match=file.name):
                verify_bundle(bundle)
        for spoiled in (b"", good[:-1], good + b"\n", good[::-1]):
            file.write_bytes(spoiled)
            with pytest.raises(MlopsError, match=file.name):
                load_bundle(bundle)
        file.write_bytes(good)
    verify_bundle(bundle)


def test_every_flipped_byte_of_an_archive_is_found(made, tmp_path):
    good = to_tar(made[0], tmp_path / "b.tar").read_bytes()
    assert load_bundle(tmp_path / "b.tar").digest == made[0].digest
    file = tmp_path / "bad.tar"
    for i in [*range(0, 1600, 23), *range(1600, len(good), len(good) // 60), len(good) - 1]:
        file.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1:])
        with pytest.raises(MlopsError, match="bad.tar"):
            load_bundle(file)
    for spoiled in (b"", good[:100], good[: len(good) // 2], good + b"\0", good[512:]):
        file.write_bytes(spoiled)
        with pytest.raises(MlopsError, match="bad.tar"):
            load_bundle(file)


@pytest.mark.parametrize("spoil", [
    lambda b: (b / "card.md").unlink(),
    lambda b: (b / "extra.txt").write_text("x"),
    lambda b: (b / ".hidden").write_text("x"),
    lambda b: (b / "sub").mkdir() or (b / "sub" / "extra.json").write_text("{}"),
    lambda b: (b / "card.md").unlink() or (b / "card.md").mkdir(),
    lambda b: (b / "card.md").rename(b.parent / "card.md") and (b / "card.md").symlink_to(b.parent / "card.md"),
    lambda b: (b / "folder").symlink_to(b.parent),
    lambda b: (b / "model.skops").rename(b / "card.md"),
    lambda b: (b / MANIFEST).write_text("{}"),
    lambda b: (b / MANIFEST).write_bytes(b"\xff\xfe"),
    lambda b: (b / MANIFEST).write_text("[" * 100_000),
    lambda b: (b / MANIFEST).unlink() or (b / MANIFEST).mkdir(),
])
def test_a_file_too_many_too_few_or_of_another_sort_is_refused(bundle, spoil):
    spoil(bundle)
    with pytest.raises(MlopsError) as e:
        load_bundle(bundle)
    assert "\n" not in str(e.value) and str(bundle) in str(e.value)


@given(st.text(alphabet=st.sampled_from("ab./\\:\0 ~"), max_size=12))
@example("../x")
@example("/x")
@example("a/../../x")
@example("x/..")
def test_no_name_in_a_manifest_leaves_the_folder(name):
    if _is_inside(name):
        path = os.path.normpath(os.path.join("/bundle", name))
        assert path.startswith("/bundle/") and path == "/bundle/" + name


def reseal(folder, name="boarding"):
    "Write a manifest that is sound for what is in the folder now"
    files = {p.name: {"size": p.stat().st_size, "sha256": digest(p)} for p in folder.iterdir() if p.name != MANIFEST}
    old = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_bytes(render_manifest({**old, "files": files}))


class Evil:
    def __reduce__(self):
        return os.mkdir, (MARK,)


def forged(module, name, *arguments):
    "A skops file that asks for a call"
    text = [{"__class__": "str", "__module__": "builtins", "__loader__": "JsonNode", "content": json.dumps(a)} for a in arguments]
    tree = {"__class__": name, "__module__": module, "__loader__": "ConstructorFromReduceNode", "protocol": 2,
            "content": {"__class__": "tuple", "__module__": "builtins", "__loader__": "TupleNode", "content": text}}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("schema.json", json.dumps(tree))
    return out.getvalue()


def test_a_malicious_file_is_never_run_even_when_its_hashes_are_right(bundle, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("evil.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    bad = [pickle.dumps(Evil()), forged("numpy", "load", "evil.npy", None, True), forged("os", "mkdir", MARK), forged("builtins", "eval", f"__import__('os').mkdir('{MARK}')"),
           forged("sklearn.utils._testing", "raises", "x"), forged("sklearn.base", "clone", "x"), forged("mlops_nb.core", "write_json", MARK, "x"),
           forged("numpy.f2py.__main__", "main"), forged("joblib", "load", "evil.npy")]
    for data in bad:
        (bundle / "model.skops").write_bytes(data)
        reseal(bundle)
        loaded = load_bundle(bundle)
        with pytest.raises(MlopsError, match="model.skops"):
            _ = loaded.model
        with pytest.raises(MlopsError, match="model.skops"):
            load_model(bundle / "model.skops")
        assert not os.path.exists(MARK)
    (bundle / "model.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(MlopsError, match="model.pkl"):
        load_bundle(bundle)
    assert not os.path.exists(MARK)
    pickle.loads(pickle.dumps(Evil()))
    assert os.path.exists(MARK)


def archive(path, members):
    "A tar of (TarInfo, content)"
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_an_archive_cannot_write_outside_its_folder(made, tmp_path):
    manifest = made[0].path.joinpath(MANIFEST).read_bytes()
    outside = render_manifest({"format": 1, "name": "x", "proof": {}, "files": {"../../escaped": {"size": 1, "sha256": digest(b"x")}}})
    first = (member(MANIFEST), manifest)
    cases = [[(member("../escaped"), b"x")], [(member("/tmp/escaped"), b"x")], [first, (member("../escaped"), b"x")], [first, (member("card.md", tarfile.SYMTYPE, "/etc/passwd"), b"")],
             [first, (member("card.md", tarfile.LNKTYPE, MANIFEST), b"")], [(member(MANIFEST), outside), (member("../../escaped"), b"x")], [first, first], [first],
             [first, (member("card.md"), b"y" * 10_000_000)], [(member("card.md"), b"x"), first], [(member(MANIFEST, tarfile.CHRTYPE), b"")]]
    for members in cases:
        with pytest.raises(MlopsError):
            load_bundle(archive(tmp_path / "evil.tar", members))
    assert [p.name for p in tmp_path.iterdir()] == ["evil.tar"]
    assert not list(tmp_path.parent.glob("**/escaped")) and not os.path.exists("/tmp/escaped")


def test_a_model_of_a_type_of_ones_own_needs_to_be_named(tmp_path, monkeypatch):
    import types

    from sklearn.dummy import DummyRegressor
    module = types.ModuleType("own_models")
    module.Own = type("Own", (DummyRegressor,), {"__module__": "own_models"})
    monkeypatch.setitem(sys.modules, "own_models", module)
    model = module.Own().fit([[1], [2]], [1, 2])
    with pytest.raises(MlopsError, match="own_models.Own"):
        save_model(model, tmp_path / "m.skops")
    save_model(model, tmp_path / "m.skops", trusted=["own_models.Own"])
    with pytest.raises(MlopsError, match="own_models.Own"):
        load_model(tmp_path / "m.skops")
    monkeypatch.setenv("MLOPS_NB_TRUSTED_TYPES", "own_models.Own")
    assert load_model(tmp_path / "m.skops").predict([[1]]) == [1.5]


def test_packaging_is_all_or_nothing(made, tmp_path, monkeypatch):
    _, model, x = made
    package(model, tmp_path / "b", name="b", sample=x)
    before = digest(tmp_path / "b")

    class Reference:
        def save(self, path):
            raise OSError(28, "No space left on device")

    with pytest.raises(MlopsError, match="No space left"):
        package(model, tmp_path / "b", name="b", sample=x.head(5), reference=Reference())
    assert digest(tmp_path / "b") == before
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


NUMBERS = pd.DataFrame({"a": np.arange(9.0), "b": np.arange(9.0) % 4})
LABELS = np.arange(9) % 2


@pytest.mark.parametrize(("said", "model", "options"), [
    ("cannot answer the sample .NotFittedError", LogisticRegression(), {}),
    ("cannot answer the sample .NotFittedError", Pipeline([("m", LogisticRegression())]), {}),
    ("cannot answer the sample .ValueError: The feature names", LogisticRegression().fit(NUMBERS[["a"]], LABELS), {}),
    ("cannot answer the sample .ValueError: Input X contains NaN", LogisticRegression().fit(NUMBERS, LABELS), {"sample": NUMBERS * np.nan}),
    ("`predict` is wanted, not OneHotEncoder", OneHotEncoder().fit(NUMBERS), {}),
    ("`predict` is wanted, not the class LogisticRegression", LogisticRegression, {}),
    ("`predict` is wanted, not NoneType", None, {}),
    ("several labels", RandomForestClassifier(2).fit(NUMBERS, np.c_[LABELS, LABELS]), {}),
    ("named 0; names have to be text", LogisticRegression().fit(NUMBERS.to_numpy(), LABELS), {"sample": pd.DataFrame(NUMBERS.to_numpy())}),
    ("'a' appears more than once", LogisticRegression().fit(NUMBERS.to_numpy(), LABELS), {"sample": NUMBERS[["a", "a"]]}),
    ("at least one row", LogisticRegression().fit(NUMBERS, LABELS), {"sample": NUMBERS.head(0)}),
    ("'training' has to be a dict, not list", LogisticRegression().fit(NUMBERS, LABELS), {"metadata": {"training": [1]}}),
    ("cannot be the name of a model", LogisticRegression().fit(NUMBERS, LABELS), {"name": "../x"}),
    ("cannot be written .File name too long", LogisticRegression().fit(NUMBERS, LABELS), {"path": "p" * 300}),
])
def test_what_cannot_be_packaged_is_refused_in_one_line(tmp_path, monkeypatch, said, model, options):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MlopsError, match=said) as e:
        package(model, **{"path": "b", "name": "m", "sample": NUMBERS, **options})
    assert len(str(e.value).splitlines()) == 1 and not list(tmp_path.iterdir())


def test_nothing_but_a_bundle_is_replaced(tmp_path):
    "A path that was mistyped may be a folder with a year's work"
    model = LogisticRegression().fit(NUMBERS, LABELS)
    (tmp_path / "work").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "work/notes.txt").write_text("a year's work")
    for place in (tmp_path / "work", tmp_path / "work/notes.txt"):
        with pytest.raises(MlopsError, match="not a bundle"):
            package(model, place, name="m", sample=NUMBERS)
    assert (tmp_path / "work/notes.txt").read_text() == "a year's work"
    for _ in range(2):
        assert package(model, tmp_path / "empty", name="m", sample=NUMBERS).predict(NUMBERS.head(1)).shape == (1,)


def test_the_module_is_light():
    program = "import sys, mlops_nb.bundle; print({'pandas', 'sklearn', 'skops', 'mlflow', 'scipy', 'polars'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "set()"
