"Our exact contributions beside those that another library tells of the columns of the model's matrix"
import numpy as np

from mlops_nb.bundle import explain_rows, scales
from mlops_nb.bundle.contributions import column_owners


def of_columns(bundle, values):
    "What the columns of the matrix contribute, summed into the caller's"
    owners, names = column_owners(bundle.json("compiled.json")), [c["name"] for c in bundle.signature["inputs"]]
    return np.stack([values[..., [i for i, o in enumerate(owners) if o == c]].sum(-1) for c in names], -1)


def output_of(bundle, row, outputs):
    "Which output is told about: the second of two classes, else the class that won"
    classes = bundle.manifest["classes"] or []
    return outputs - 1 if len(classes) == 2 or outputs == 1 else int(bundle.predict_proba([row])[0].argmax())


def farthest(bundle, rows, base, values):
    "How far our contributions are from theirs, which have the shape (rows, outputs, features), beside the largest"
    theirs, far, factor = of_columns(bundle, values), [0.0], bundle.contributions.factor
    averages = bundle.contributions.scale in ("probability", "value") and bundle.contributions.method == "tree"    # shap and the libraries average themselves
    for i, (row, told) in enumerate(zip(rows, explain_rows(bundle, rows))):
        k = output_of(bundle, row, theirs.shape[1])
        scale = 1 if averages else factor
        own = np.array([told.base_value, *told.contributions.values()])
        far.append(np.abs(own - scale * np.r_[base[k], theirs[i, k]]).max() / np.abs(own).max())
        assert told.method == bundle.contributions.method and told.scale == scales(bundle)[0]
        assert abs(told.base_value + sum(told.contributions.values()) - told.output) <= 1e-9 * max(1, abs(told.output))
    return max(far)
