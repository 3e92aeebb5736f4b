"The same frames and the same schema, judged by us, by pandera and by Great Expectations: the same verdicts."
import json
import subprocess

import numpy as np
import pandas as pd
import peers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.validation import Schema, validate
from mlops_nb.validation.interop import from_great_expectations, from_pandera, to_great_expectations, to_pandera

NUMBER, TEXT = {"kind": "number"}, {"kind": "category"}


def schema() -> Schema:
    "One of each check that all three have"
    return Schema.model_validate({
        "columns": {
            "age": {**NUMBER, "checks": [{"check": "not_null"}, {"check": "range", "min": 0, "max": 120}]},
            "floor": {**NUMBER, "checks": [{"check": "range", "min": -1}]},
            "code": {**TEXT, "checks": [{"check": "pattern", "pattern": "[A-Z]{2}[0-9]+"}, {"check": "unique"}]},
            "plan": {**TEXT, "checks": [{"check": "allowed", "values": ["free", "paid"]}]},
            "note": {"kind": "text", "checks": [{"check": "length", "min": 1, "max": 5}]},
            "low": NUMBER, "high": NUMBER,
        },
        "frame": {"unique": [["age", "plan"]], "rules": [{"name": "order", "expression": "high >= low"}], "min_rows": 10},
    })


def good(n: int = 40) -> pd.DataFrame:
    "Rows that meet it"
    return pd.DataFrame({"age": np.arange(n) + 0.5, "floor": np.where(np.arange(n) % 7 == 0, np.nan, 1.0), "code": [f"AB{i}" for i in range(n)], "plan": ["free", "paid"] * (n // 2),
                         "note": ["hello"] * n, "low": 1.0, "high": 2.0})


def broken() -> dict[str, tuple[pd.DataFrame, set[int]]]:
    "Frames with one fault each, and the rows that have it"
    cases = {"fine": (good(), set())}
    for name, column, value in [("missing", "age", np.nan), ("above", "age", 121.0), ("below", "floor", -2.0), ("pattern", "code", "AB3x"), ("pattern inside", "code", "xAB3"),
                                ("set", "plan", "gold"), ("long", "note", "too long"), ("order", "high", 0.5)]:
        cases[name] = (good().assign(**{column: lambda f, c=column, v=value: f[c].where(f.index != 3, v)}), {3})
    cases["twice"] = (good().assign(code=lambda f: f.code.where(f.index != 7, "AB3")), {7})
    return cases


CASES = broken()


@pytest.mark.parametrize("case", CASES)
def test_pandera_finds_the_same_rows(case):
    import pandera.pandas as pa
    frame, wrong = CASES[case]
    theirs, left = to_pandera(schema())
    assert not left
    try:
        theirs.validate(frame, lazy=True)
        found = set()
    except pa.errors.SchemaErrors as e:
        found = set(e.failure_cases["index"].dropna().astype(int))
    ours = {i for rows in validate(frame, schema()).frame.rows for i in rows}
    assert ours == wrong and found == wrong
    back = from_pandera(theirs)[0]
    if case not in ("twice", "order"):          # these are functions in pandera, and named as left out
        assert validate(frame, back).passed == (not wrong)


GX = """
import json, sys, warnings
warnings.simplefilter("ignore")
import great_expectations as gx, pandas as pd
suite, folder = json.load(open(sys.argv[1])), sys.argv[2]
context = gx.get_context(mode="ephemeral")
context.variables.progress_bars = {"globally": False}
expectations = gx.ExpectationSuite(**suite)
definition = context.data_sources.add_pandas("d").add_dataframe_asset("a").add_batch_definition_whole_dataframe("b")
out = {}
for name in json.load(open(folder + "/cases.json")):
    result = definition.get_batch({"dataframe": pd.read_parquet(f"{folder}/{name}.parquet")}).validate(expectations, result_format="COMPLETE")
    failed = [r for r in result.results if not r.success]
    out[name] = {"rows": sorted({i for r in failed for i in r.result.get("unexpected_index_list", [])}), "errors": [str(r.exception_info)[:300] for r in failed if "unexpected_index_list" not in r.result]}
print(json.dumps({"out": out, "suite": expectations.to_json_dict()}))
"""


@pytest.mark.drill
def test_great_expectations_finds_the_same_rows(tmp_path):
    suite, left = to_great_expectations(schema())
    assert not left
    (tmp_path / "suite.json").write_text(json.dumps(suite))
    (tmp_path / "cases.json").write_text(json.dumps(list(CASES)))
    for name, (frame, _) in CASES.items():
        frame.to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "run.py").write_text(GX)
    done = subprocess.run([peers.python_of("validation"), "run.py", "suite.json", "."], cwd=tmp_path, capture_output=True, text=True, env={"GX_ANALYTICS_ENABLED": "false", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    for name, (_, wrong) in CASES.items():
        assert not said["out"][name]["errors"], name
        expected = wrong | ({3} if name == "twice" else set())     # it counts the first of two as well
        assert set(said["out"][name]["rows"]) == expected, name
    back, left = from_great_expectations(said["suite"])
    assert not left
    for name, (frame, wrong) in CASES.items():
        assert validate(frame, back).passed == (not wrong), name


# Any schema, judged by pandera, and read back from both

REFUSES = st.sampled_from(["critical", "high"])
CELLS = {"number": ("float64", [None, 0.0, 1.0, -1.0, 0.5, 2.0, -3.0]), "category": (object, [None, "a", "b", "", "ab", "1", "a\n", "A", "abcd"]), "boolean": ("boolean", [None, True, False]),
         "datetime": ("datetime64[us]", [None, pd.Timestamp("2024-01-01"), pd.Timestamp("2023-12-31T23:00"), pd.Timestamp("2024-02-01")])}
SOME = {"number": [{"check": "range", "min": 0}, {"check": "range", "min": -0.5, "max": 1}, {"check": "allowed", "values": [0, 1, 0.5]}, {"check": "monotonic"}, {"check": "monotonic", "direction": "decreasing"}],
        "category": [{"check": "allowed", "values": ["a", "ab", "1"]}, {"check": "length", "min": 1, "max": 2}, *({"check": "pattern", "pattern": p} for p in ("a|ab", "(?i)A", "a$", "a.*", r"a\$", r"\d", "", "(a)(b)?"))],
        "datetime": [{"check": "range", "min": "2024-01-01"}, {"check": "range", "max": "2024-01-01T00:00:00+02:00"}], "boolean": [{"check": "allowed", "values": [True]}]}


@st.composite
def judged(draw):
    "A frame and a schema for it"
    kinds, n = draw(st.lists(st.sampled_from(list(CELLS)), min_size=1, max_size=3)), draw(st.integers(0, 6))
    names = ["a", "b c", 'd"'][:len(kinds)]
    frame = pd.DataFrame({c: pd.Series(draw(st.lists(st.sampled_from(CELLS[k][1]), min_size=n, max_size=n)), dtype=CELLS[k][0]) for c, k in zip(names, kinds)})
    checks = lambda k: draw(st.lists(st.sampled_from([{"check": "not_null"}, {"check": "unique"}, *SOME[k]]), max_size=3, unique_by=lambda c: c["check"]))
    columns = {c: {"kind": k, "checks": [check | {"severity": draw(REFUSES)} for check in checks(k)]} for c, k in zip(names, kinds)}
    rules = [{"name": "r", "expression": f'col("{c}") > 0'} for c, k in zip(names, kinds) if k == "number" and '"' not in c and draw(st.booleans())]
    whole = {"rules": rules, "unique": draw(st.sampled_from([[], [names], [names[:1]]])), "min_rows": draw(st.sampled_from([None, 3])), "min_rows_severity": "high"}
    return frame, Schema.model_validate({"columns": columns, "frame": whole})


@settings(max_examples=60, derandomize=True, deadline=None)
@given(judged())
def test_pandera_and_what_is_read_back_judge_alike(case):
    import pandera.pandas as pa
    frame, ours = case
    want = validate(frame, ours).passed
    theirs, left = to_pandera(ours)
    try:
        theirs.validate(frame, lazy=True)
        found = True
    except pa.errors.SchemaErrors:
        found = False
    assert not left and found == want
    back, left = from_pandera(theirs)
    assert left or validate(frame, back).passed == want
    suite, left = to_great_expectations(ours)
    back, lost = from_great_expectations(json.loads(json.dumps(suite)))
    assert left or lost or validate(frame, back).passed == want
