"Exact contributions are what the package shap says, in an environment that has it"
import json
import os
import subprocess

import numpy as np
import peers
import pytest
from beside import farthest

from mlops_nb.bundle import load_bundle


@pytest.mark.drill
def test_they_are_what_shap_says(tmp_path, root):
    done = subprocess.run([peers.python_of("shap"), root / "tests/shap_values.py", tmp_path], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr[-3000:]
    far, methods = {}, set()
    for name, told in json.loads((tmp_path / "found.json").read_text()).items():
        bundle = load_bundle(tmp_path / told["at"])
        far[name] = farthest(bundle, told["rows"], told["base"], np.array(told["values"]).transpose(0, 2, 1))
        methods.add(bundle.contributions.method)
    assert len(far) > 15 and methods == {"tree", "linear"} and max(far.values()) < 1e-12, far
