"LightGBM's and XGBoost's models: compiled and proven where those libraries are, and served where they are not; or refused with the reason."
import importlib.util
import json
import os
import subprocess

import numpy as np
import peers
import pytest
from beside import farthest

from mlops_nb.bundle import load_bundle
from mlops_nb.core import MlopsError
from mlops_nb.registry.export import _onnx

REFUSED = {"light, ova": "objective multiclassova", "light, root": "objective regression sqrt", "light, cross entropy": "objective cross_entropy", "light, linear trees": "its leaves are linear models",
           "light, categories": "native categorical", "xg, dart": "booster dart", "xg, linear": "booster gblinear", "xg, logistic": "objective reg:logistic", "xg, missing": "takes 0.0 for missing",
           "xg, categories": "native categorical"}


@pytest.fixture(scope="module")
def found(tmp_path_factory, root):
    "What `tests/boosters.py` told of each model, with its bundle"
    folder = tmp_path_factory.mktemp("boosters")
    done = subprocess.run([peers.python_of("boosters"), root / "tests/boosters.py", folder], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: {**told, "bundle": load_bundle(folder / told["at"])} for name, told in json.loads((folder / "found.json").read_text()).items()}


@pytest.fixture(scope="module")
def compiled(found):
    return {name: told for name, told in found.items() if name not in REFUSED}


@pytest.mark.drill
def test_each_model_is_compiled_and_proven(compiled):
    assert len(compiled) > 45 and {name: told["reason"] for name, told in compiled.items() if not told["compiled"]} == {}
    assert max(told["difference"] for name, told in compiled.items() if name.startswith("light")) < 1e-12
    assert max(told["difference"] for told in compiled.values()) < 1e-6
    assert {name for name, told in compiled.items() if not told["kinds"]["thresholds"]} == set()
    assert all(told["kinds"]["missing"] and told["kinds"]["extreme"] for told in compiled.values())


@pytest.mark.drill
def test_a_compiled_model_is_served_without_its_library(compiled):
    assert importlib.util.find_spec("lightgbm") is importlib.util.find_spec("xgboost") is None
    for name, told in compiled.items():
        labels, scores = told["bundle"].predict_rows(told["rows"])
        alone = [told["bundle"].predict_rows([row]) for row in told["rows"][:20]]
        own = np.array(told["own"])
        if scores is None:
            assert np.allclose(labels, own, rtol=1e-6), name
            assert np.allclose([a[0][0] for a in alone], labels[:20], rtol=1e-12), name
        else:
            assert labels == told["labels"] and [a[0][0] for a in alone] == labels[:20], name
            assert np.abs(scores - (own[:, 1] if own.shape[1] == 2 else own.max(axis=1))).max() < 1e-6, name


@pytest.mark.drill
def test_what_columns_add_is_what_the_library_says(compiled):
    far = {}
    for name, told in compiled.items():
        values = np.array(told["contributions"])
        far[name] = farthest(told["bundle"], told["rows"][:10], values[0, :, -1], values[:, :, :-1])
        assert told["bundle"].contributions.method == "tree", name
    assert max(v for name, v in far.items() if name.startswith("light")) < 1e-9, far
    assert max(far.values()) < 1e-4, far                       # XGBoost adds its own in single precision


@pytest.mark.drill
def test_a_compiled_model_leaves_as_one_graph(compiled, tmp_path):
    for name, told in compiled.items():
        _onnx(name, told["bundle"], tmp_path)
        error = json.loads((tmp_path / "error.json").read_text())
        limit = 1e-5 if name.startswith("xg") else 1e-9         # a runtime with several threads adds float32 in another order
        assert error["rows"] > 100 and error["labels"] == 0 and error["difference"] < limit, (name, error)


@pytest.mark.drill
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_compiled_form_says_why(found, name, tmp_path):
    told = found[name]
    assert not told["compiled"] and REFUSED[name] in told["reason"]
    with pytest.raises(MlopsError, match="no compiled form .*so it cannot be written as one graph"):
        _onnx(name, told["bundle"], tmp_path)
    with pytest.raises(MlopsError, match="needs the package (lightgbm|xgboost), which is not installed"):
        told["bundle"].predict_rows(told["rows"])
    assert any(line.startswith(("lightgbm==", "xgboost")) for line in (told["bundle"].path / "requirements.txt").read_text().splitlines())
