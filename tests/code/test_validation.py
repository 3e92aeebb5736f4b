"Validation against plain Python: verdicts, fates of the rows, rules as text, schemas that people spoil while editing."
import ast
import datetime as dt
import decimal
import math
import operator
import re
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlops_nb.core import MlopsError
from mlops_nb.validation import Check, Column, Frame, Rule, Schema, validate
from mlops_nb.validation.columns import compile_rule, parse_rule

SEVERITIES = st.sampled_from(["critical", "high", "medium", "low"])
VALUES = {
    "number": st.none() | st.integers(-3, 3).map(float) | st.sampled_from([math.nan, math.inf, -math.inf, 0.5, "2", "-1.5", "x", "nan", ""]),
    "category": st.none() | st.sampled_from(["a", "b", "c", "", "nan", "abc"]),
    "boolean": st.none() | st.sampled_from([True, False, "true", "FALSE", "0", "maybe"]),
    "datetime": st.none() | st.sampled_from(["2024-01-01", "2024-01-02T03:04", "2024-01-02 03:04:00Z", "soon", "2024-02-30"]),
}


def checks(kind):
    "A strategy for checks that a column of this kind may have"
    more = {"severity": SEVERITIES}
    bounds = {"number": st.integers(-2, 2), "datetime": st.sampled_from(["2024-01-01", "2024-01-02T00:00"])}
    some = [st.builds(Check, check=st.just("unique"), **more), st.builds(Check, check=st.just("not_null"), severity=st.sampled_from(["critical", "high", "low"])),
            st.builds(Check, check=st.just("type"), **more), st.builds(Check, check=st.just("not_null"), severity=st.just("medium"), action=st.just("drop"))]
    if kind in bounds:
        some += [st.builds(Check, check=st.just("range"), min=bounds[kind], action=st.sampled_from([None, "clip", "drop"]), **more), st.builds(Check, check=st.just("monotonic"), **more)]
    if kind == "category":
        some += [st.builds(Check, check=st.just("allowed"), values=st.lists(st.sampled_from("abc"), min_size=1, max_size=2), action=st.sampled_from([None, "drop"]), **more),
                 st.builds(Check, check=st.just("length"), min=st.just(1), max=st.just(2), **more), st.builds(Check, check=st.just("pattern"), pattern=st.just("a|b+"), **more)]
    return st.lists(st.one_of(some), max_size=4, unique_by=lambda c: c.check)


@st.composite
def tables(draw):
    "A frame of odd values and a schema for it"
    kinds = draw(st.lists(st.sampled_from(list(VALUES)), min_size=1, max_size=3))
    n = draw(st.integers(0, 12))
    frame = pd.DataFrame({f"c{i}": pd.Series(draw(st.lists(VALUES[k], min_size=n, max_size=n)), dtype=object) for i, k in enumerate(kinds)})
    columns = {f"c{i}": Column(kind=k, checks=draw(checks(k))) for i, k in enumerate(kinds)}
    unique = draw(st.just([]) | st.just([list(columns)]))
    return frame, Schema(columns=columns, frame=Frame(unique=unique, unique_severity=draw(SEVERITIES)))


def missing(v):
    return v is None or isinstance(v, float) and math.isnan(v)


def parsed(v, kind):
    "What a value is as that kind; ValueError when it is none"
    if kind == "number":
        if isinstance(v, str) and v == "nan":
            raise ValueError
        return float(v)
    if kind == "boolean":
        if isinstance(v, bool):
            return v
        return {"true": True, "false": False, "0": False, "1": True}[v.lower()]
    if kind == "datetime":
        return datetime.fromisoformat(v.replace("Z", ""))
    return v


def expected(values, column):
    "Failing rows of each check, one value after the other"
    typed, wrong = [], set()
    for i, v in enumerate(values):
        try:
            typed.append(None if missing(v) else parsed(v, column.kind))
        except (ValueError, KeyError):
            typed.append(None)
            wrong.add(i)
    there = [(i, v) for i, v in enumerate(typed) if v is not None]
    bound = lambda b: b if column.kind == "number" else datetime.fromisoformat(b)
    out = {"type": wrong}
    for c in column.checks:
        if c.check == "range":
            out["range"] = {i for i, v in there if v < bound(c.min)}
        if c.check == "allowed":
            out["allowed"] = {i for i, v in there if v not in c.values}
        if c.check == "length":
            out["length"] = {i for i, v in there if not c.min <= len(v) <= c.max}
        if c.check == "pattern":
            out["pattern"] = {i for i, v in there if not re.fullmatch(c.pattern, v)}
        if c.check == "unique":
            out["unique"] = {i for k, (i, v) in enumerate(there) if any(v == w for _, w in there[:k])}
        if c.check == "monotonic":
            out["monotonic"] = {i for k, (i, v) in enumerate(there) if any(v < w for _, w in there[:k])}
    repaired = [out[c.check] for c in column.checks if c.check != "not_null" and c.severity == "medium" and c.repair == "null"]
    if any(c.check == "not_null" for c in column.checks):
        out["not_null"] = {i for i, v in enumerate(values) if missing(v)}.union(*repaired)
    return out


@given(tables())
def test_every_check_finds_the_rows_that_plain_python_finds(table):
    frame, schema = table
    result = validate(frame, schema)
    for name, column in schema.columns.items():
        want = expected(frame[name].tolist(), column)
        found = result.frame[result.frame.column == name].set_index("check")
        assert {k: len(v) for k, v in want.items()} == found.failed.to_dict()
        for check, rows in want.items():
            assert found.rows[check] == sorted(rows)[:5]


@given(tables())
def test_no_row_is_lost_and_none_is_doubled(table):
    frame, schema = table
    frame["row"] = range(len(frame))
    schema.columns["row"] = Column(kind="number")
    result = validate(frame, schema)
    c = result.counts
    assert c["passed"] + c["quarantined"] + c["dropped"] == c["read"] == len(frame)
    assert len(result.clean) == c["passed"] and len(result.quarantined) == c["quarantined"]
    seen = [*result.clean.row, *result.quarantined.row]
    assert len(set(seen)) == len(seen)
    assert (result.quarantined._reasons.str.len() > 0).all()
    failed = result.frame[result.frame.failed > 0]
    assert result.halted == (failed.severity == "critical").any()
    assert result.passed == (not failed.severity.isin(["critical", "high"]).any())


@given(tables())
def test_what_is_clean_stays_clean(table):
    frame, schema = table
    again = validate(validate(frame, schema).clean, schema)
    failed = again.frame[(again.frame.failed > 0) & (again.frame.severity != "low")]
    # the first of two equal values may have become another by a repair of its own; order may be disturbed by clipping
    assert set(failed.check) <= {"unique", "monotonic"} | {c for c in failed.check if c.startswith("unique ")}, failed.to_string()
    assume(not any(c.repair in ("clip", "null") and c.severity == "medium" for col in schema.columns.values() for c in col.checks))
    assert failed.empty, failed.to_string()


WORDS = st.text(alphabet="abé\0 ß𝄞", max_size=14)
NUMBERS = st.integers(-9, 9) | st.integers(-2**63, 2**63 - 1) | st.sampled_from([2**53, 2**53 + 1])


@given(st.lists(WORDS, min_size=1, max_size=40), st.lists(st.none() | WORDS, max_size=20), st.integers(0, 20))
def test_the_quick_look_up_of_text_says_what_plain_python_says(allowed, more, start):
    column = [*more, *allowed, None][start:]
    schema = lambda values: Schema(columns={"x": Column(kind="category", checks=[Check(check="allowed", values=values)])})
    for values in (allowed, allowed[:1], allowed[1:] or ["c"]):
        wrong = sum(v is not None and v not in values for v in column)
        frame = pl.concat([pl.DataFrame({"x": part}, schema={"x": pl.String}) for part in ([*more, *allowed][:start], column)])[min(start, len(more) + len(allowed)):]
        assert validate(frame, schema(values)).counts["quarantined"] == wrong == validate(frame.lazy(), schema(values)).counts["quarantined"]


@given(st.lists(st.none() | NUMBERS, max_size=30) | st.lists(st.none() | st.floats(), max_size=30), st.sampled_from([pl.Int64, pl.Float64, pl.Int8, pl.Datetime("us"), pl.UInt64, pl.Int128]))
def test_what_repeats_is_what_plain_python_counts_twice(values, dtype):
    frame = pl.DataFrame({"x": pl.Series(values, dtype=pl.Float64 if any(isinstance(v, float) for v in values) else pl.Int64).cast(dtype, strict=False)})
    seen = [v for v in frame["x"].to_physical().to_list() if v is not None and v == v]
    kind = "datetime" if dtype == pl.Datetime else "number"
    assert validate(frame, Schema(columns={"x": Column(kind=kind, checks=[Check(check="unique")])})).counts["quarantined"] == len(seen) - len(set(seen))


@settings(max_examples=25)
@given(tables(), st.randoms())
def test_storage_index_and_order_of_columns_do_not_matter(table, random):
    frame, schema = table
    want = validate(frame, schema)
    text = frame.map(lambda v: v if missing(v) else str(v))
    shuffled = list(frame)
    random.shuffle(shuffled)
    others = [frame[shuffled], frame.set_index(pd.Index([7] * len(frame))), pl.from_pandas(text.astype("str"))]
    if len(frame):
        others += [text.astype("category"), text.astype("str"), pa.Table.from_pandas(text.astype("str"), preserve_index=False)]
    for other in others:
        got = validate(other, schema)
        assert got.counts == want.counts
        assert got.frame.drop(columns="message").astype(str).equals(want.frame.drop(columns="message").astype(str))


@given(tables())
def test_a_lazily_read_file_has_the_same_verdict(tmp_path_factory, table):
    frame, schema = table
    frame = pl.from_pandas(frame.map(lambda v: v if missing(v) else str(v)).astype("str"))
    path = tmp_path_factory.mktemp("v") / "x.parquet"
    frame.write_parquet(path)
    eager, lazy = validate(frame, schema), validate(pl.scan_parquet(path), schema)
    assert lazy.frame.equals(eager.frame) and lazy.counts == eager.counts
    assert lazy.clean.equals(eager.clean) and lazy.quarantined.equals(eager.quarantined)


@given(tables())
def test_what_was_inferred_holds_and_survives_the_file(tmp_path_factory, table):
    frame, _ = table
    schema = Schema.infer(frame)
    assert validate(frame, schema).frame.failed.sum() == 0
    path = tmp_path_factory.mktemp("s") / "schema.yaml"
    schema.save(path)
    assert Schema.load(path) == schema
    assert schema.diff(schema).changes == []


@given(tables())
def test_any_schema_survives_yaml_and_json(tmp_path_factory, table):
    _, schema = table
    for name in ("s.yaml", "s.json"):
        path = tmp_path_factory.mktemp("s") / name
        schema.save(path)
        assert Schema.load(path) == schema


@settings(max_examples=25)
@given(tables(), st.data())
def test_data_that_were_good_are_good_under_a_compatible_schema(table, data):
    frame, old = table
    new = old.model_copy(deep=True)
    for column in new.columns.values():
        column.checks = data.draw(checks(column.kind))
    if data.draw(st.booleans()):
        new.frame = Frame(rules=[Rule(name="r", expression="not is_null(c0)", severity=data.draw(SEVERITIES))])
    assume(old.diff(new).compatible)
    before, after = validate(frame, old), validate(frame, new)
    assert after.passed or not before.passed


def test_passes_over_the_data_do_not_grow_with_the_number_of_failing_checks(monkeypatch):
    n = 500
    frame = pd.DataFrame({f"x{i}": np.arange(n) for i in range(20)})
    schema = Schema(columns={f"x{i}": Column(kind="number", checks=[Check(check="range", max=5), Check(check="allowed", values=[1, 2]), Check(check="unique")]) for i in range(20)})
    count, collect = [0], pl.LazyFrame.collect
    monkeypatch.setattr(pl.LazyFrame, "collect", lambda self, **kw: (count.__setitem__(0, count[0] + 1), collect(self, **kw))[1])
    result = validate(frame, schema)
    assert count[0] == 5    # on no rows, screens, the columns numpy is asked about, masks, examples
    assert result.counts["quarantined"] == n - 2
    assert all(len(rows) <= 5 for rows in result.frame.rows)


def test_columns_that_are_missing_extra_or_changed():
    schema = Schema(columns={"a": Column(kind="number"), "b": Column(kind="category", role="ignore")}, frame={"rules": [{"name": "r", "expression": "a > 0", "severity": "medium"}], "unique": [["a"]]})
    result = validate(pd.DataFrame({"z": [1, 2]}), schema)
    found = result.frame.set_index(["check", "column"])
    assert result.halted and result.counts["passed"] == 2
    assert found.severity[("type", "a")] == "critical" and "'a'" in found.message[("type", "a")]
    assert found.severity[("type", "b")] == "low"
    assert found.failed[("extra", "z")] == 2
    assert "cannot be evaluated" in found.message[("rule r", "")]
    changed = validate(pd.DataFrame({"a": pd.to_datetime(["2024-01-01", None]), "b": ["x", None]}), schema)
    assert changed.frame.failed.tolist()[0] == 1 and changed.counts["quarantined"] == 1


@pytest.mark.parametrize("frame", [pd.DataFrame(), pd.DataFrame({"a": []}), pd.DataFrame({"a": [None, None]}), pl.DataFrame({"a": [None]}), pd.DataFrame({"a": [math.nan]}), pa.table({"a": pa.nulls(3)})])
def test_frames_with_nothing_in_them(frame):
    schema = Schema(columns={"a": Column(kind="number", checks=[Check(check="unique"), Check(check="not_null", severity="low")])})
    result = validate(frame, schema)
    assert result.counts["passed"] == result.counts["read"]
    assert result.clean is not None and result.quarantined.empty and result._repr_html_()


TERMS = st.recursive(
    st.sampled_from(["a", "b", "1", "-2", "0.5"]), lambda t: st.builds("({} {} {})".format, t, st.sampled_from("+-*"), t) | st.builds("abs({})".format, t) | st.builds("-{}".format, t), max_leaves=4)
RULES = st.recursive(
    st.builds("{} {} {}".format, TERMS, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), TERMS) | st.builds("{} < {} <= {}".format, TERMS, TERMS, TERMS)
    | st.builds("is_null({})".format, TERMS) | st.builds("{} in [1, -2, 0.5]".format, TERMS) | st.builds("{} not in [1]".format, TERMS),
    lambda r: st.builds("({} and {})".format, r, r) | st.builds("({} or {})".format, r, r) | st.builds("(not {})".format, r), max_leaves=5)


def kleene(rule, row):
    "Evaluate a rule by its syntax tree with SQL's three values"
    ops = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}

    def conjunction(values): return False if False in values else None if None in values else True

    def compare(x, op, y):
        if isinstance(op, ast.In): return None if x is None else x in y
        if isinstance(op, ast.NotIn): return None if x is None else x not in y
        return None if x is None or y is None else ops[type(op)](x, y)

    def go(n):
        if isinstance(n, ast.Name): return row[n.id]
        if isinstance(n, ast.Constant): return n.value
        if isinstance(n, ast.List): return [go(e) for e in n.elts]
        if isinstance(n, ast.UnaryOp):
            x = go(n.operand)
            return None if x is None else (not x if isinstance(n.op, ast.Not) else -x)
        if isinstance(n, ast.BinOp):
            x, y = go(n.left), go(n.right)
            return None if x is None or y is None else ops[type(n.op)](x, y)
        if isinstance(n, ast.Call):
            x = go(n.args[0])
            return x is None if n.func.id == "is_null" else None if x is None else abs(x)
        if isinstance(n, ast.BoolOp):
            values = [go(v) for v in n.values]
            return conjunction(values) if isinstance(n.op, ast.And) else True if True in values else None if None in values else False
        parts = [go(n.left), *(go(c) for c in n.comparators)]
        return conjunction([compare(x, op, y) for x, op, y in zip(parts, n.ops, parts[1:])])

    return go(ast.parse(rule, mode="eval").body)


@settings(max_examples=100)
@given(RULES)
def test_rules_mean_what_they_mean_in_sql(rule):
    assume("a" in re.findall(r"\b[ab]\b", rule) or "b" in re.findall(r"\b[ab]\b", rule))
    rows = [{"a": a, "b": b} for a in (None, 1.0, -2.0, 0.5) for b in (None, 0.5, 2.0)]
    frame = pl.DataFrame(rows, schema={"a": pl.Float64, "b": pl.Float64})
    tree, used = parse_rule(rule)
    got = frame.select(compile_rule(tree, {c: pl.col(c) for c in used}).alias("r"))["r"].to_list()
    assert got == [kleene(rule, row) for row in rows]


@settings(max_examples=300)
@given(st.text(max_size=40) | st.text(alphabet="ab_.()[]{}<>=+-*/%'\", 019:@!\\\n\0", max_size=40))
def test_no_text_does_anything_but_parse_or_be_refused(text):
    try:
        _, used = parse_rule(text)
        assert used
    except ValueError as e:
        assert str(e)


@pytest.mark.parametrize("text", ["open('x')", "().__class__", "a.b", "a[0]", "a @ b", "a ** 9", "a << 9", "(yield)", "a if b else a", "{a}", "[i for i in a]", "lambda: a", "a; b", "import os", "print(a)", "col(a)", "col('a').b",
                                  "date(a)", "abs(*a)", "__import__('os')", "a is None", "f'{a}'", "...", "1j > a", "b'x' == a", "a in b", "a in [b]", "eval('a')", "a := 1", "await a", "''.join(a)"])
def test_nothing_else_is_a_rule(text):
    with pytest.raises(ValueError):
        parse_rule(text)


GOOD = """version: 1
columns:
  price:
    kind: number
    checks:
      - {check: range, min: 0, max: 10, severity: high}
  day: {kind: datetime, role: time}
frame:
  min_rows: 3
  rules:
    - {name: r, expression: price > 0, severity: low}
"""


@settings(max_examples=200)
@given(st.data())
def test_a_spoilt_schema_is_an_error_that_names_the_file(tmp_path_factory, data):
    words = re.findall(r"\w+|\W", GOOD)
    i = data.draw(st.integers(0, len(words) - 1))
    words[i] = data.draw(st.sampled_from(["", "no", "[", "{", ":", "-", "null", "2024-13-45", "1e999", ".nan", "&a", "*a", "!!python/object:os.system", "\t", "\0", "'", "columns", "price", "{}", "[[1]]", "!", "0x", "1:2:3"]))
    path = tmp_path_factory.getbasetemp() / "spoilt.yaml"
    path.write_text("".join(words))
    try:
        schema = Schema.load(path)
        validate(pd.DataFrame({"price": [1, 20], "day": ["2024-01-01", "x"]}), schema)
    except MlopsError as e:
        assert "spoilt.yaml" in str(e)


def test_ages_and_freshness():
    now = datetime.now(UTC).replace(tzinfo=None)
    schema = Schema(columns={"t": Column(kind="datetime", checks=[Check(check="freshness", max_age="2h", severity="critical")])})
    assert not validate(pd.DataFrame({"t": [now, now - timedelta(days=9)]}), schema).halted
    assert validate(pd.DataFrame({"t": [now - timedelta(days=9)]}), schema).halted
    assert validate(pd.DataFrame({"t": pd.to_datetime([])}), schema).halted            # no data is never good news
    assert validate(pl.LazyFrame({"t": [None, None]}, {"t": pl.Datetime("ns", "UTC")}), schema).halted


def test_personal_values_are_not_shown():
    schema = Schema(columns={"mail": Column(kind="text", personal=True, checks=[Check(check="pattern", pattern="x")])})
    result = validate(pd.DataFrame({"mail": ["secret@home"]}), schema)
    assert "secret" not in result.frame.to_string() + result._repr_html_() + str(result.to_dict())


# The command line

def test_rows_set_aside_come_back_once_the_schema_knows_them(tmp_path):
    from typer.testing import CliRunner

    from mlops_nb.cli import app
    run = lambda *args: CliRunner().invoke(app, [str(a) for a in args])
    schema = lambda *shops: Schema(columns={"shop": Column(kind="category", checks=[Check(check="allowed", values=list(shops))])}).save(tmp_path / "s.yaml")
    data, aside = tmp_path / "d.parquet", tmp_path / "aside"
    pd.DataFrame({"shop": ["a", "b", "new", "new", "?"]}).to_parquet(data)
    schema("a", "b")
    assert run("validate", data, "--schema", tmp_path / "s.yaml", "--quarantine", aside).exit_code == 2
    schema("a", "b", "new")
    again = run("validate", aside / "d.parquet", "--schema", tmp_path / "s.yaml", "--replay")
    assert again.exit_code == 2 and "released:" in again.output and "2 passed" in again.output
    (released,) = aside.glob("*.released-*")
    assert len(pd.read_parquet(released)) == 2 and len(pd.read_parquet(aside / "d.parquet")) == 1
    schema("a", "b", "new", "?")
    assert run("validate", aside / "d.parquet", "--schema", tmp_path / "s.yaml", "--replay").exit_code == 0


def test_distributions_are_checked_against_a_table(tmp_path):
    from typer.testing import CliRunner

    from mlops_nb.cli import app
    rng = np.random.default_rng(0)
    for name, shift in (("a", 0.0), ("b", 1.0)): pd.DataFrame({"x": rng.normal(shift, 1, 2000)}).to_parquet(tmp_path / f"{name}.parquet")
    schema = tmp_path / "s.yaml"
    Schema(columns={"x": Column(kind="number")}, frame=Frame(distribution_severity="high")).save(schema)
    run = lambda reference: CliRunner().invoke(app, ["validate", str(tmp_path / "b.parquet"), "--schema", str(schema), "--reference", str(tmp_path / reference)])
    assert run("b.parquet").exit_code == 0
    moved = run("a.parquet")
    assert moved.exit_code == 2 and "distributed otherwise" in moved.output


ODD = {
    "numbers": [1e308, -1e308, math.inf, math.nan, 5e-324], "huge": pd.Series([2**70, None, -2**64], dtype=object), "unsigned": np.array([2**63, 2**64 - 1], dtype="uint64"), "small": np.array([1, 2], dtype="int8"),
    "half": np.array([1.5], dtype="float16"), "nullable": pd.array([1, None], dtype="Int64"), "complex": [1j, 2], "decimal": [decimal.Decimal("12345678901234567891"), None], "sparse": pd.arrays.SparseArray([0, 1]),
    "text": ["1", "x", None, " 1e400", "nan"], "surrogate": pd.Series(["\ud800", None], dtype=object), "bytes": [b"\xff", b"a"], "objects": [object(), 1], "null": pd.Series([None] * 3, dtype=object), "empty": pd.Series([], dtype=object),
    "levels": pd.Categorical(["a"], categories=["a", "b"]), "no level": pd.Categorical([None], categories=["a"]), "lists": [[1], None], "dicts": [{"a": 1}, {}], "no keys": [{}], "tuples": [(1, 2)], "flags": pd.Series([True, None], dtype=object),
    "spans": pd.to_timedelta([1, None], "D"), "periods": pd.period_range("2024", periods=2, freq="M"), "intervals": pd.interval_range(0, 2), "cut": pd.cut([1, 2], 2), "clock": [dt.time(1)], "dates": [dt.date(2024, 1, 1), None],
    "zone": pd.to_datetime(["2024-01-01"]).tz_localize("Asia/Tokyo"), "zones": pd.Series([pd.Timestamp("2024-01-01", tz="UTC"), pd.Timestamp("2024-01-01", tz="Asia/Tokyo")], dtype=object),
    "long ago": np.array(["0001-01-01", "9999-12-31"], dtype="datetime64[s]"), "no time": [pd.NaT], "iso": ["2024-01-01", "9999-12-31T23:59:59+14:00", "x"],
}
BOUNDS = {"number": [0, 1.5, -1e308, 2**64, -(2**70), math.inf, 5e-324], "category": ["a", "", 1, 2.5], "text": ["a"], "datetime": ["2024-01-01", "0001-01-01", "9999-12-31T23:59:59", "2024-01-01T00:00:00+02:00"], "boolean": [True, False]}
RULES = ["x > 1", "x == 'a'", "is_null(x)", "length(x) > 1", "hours(x - x) > 1", "abs(x) > 2", "x > date('2024-01-01')", "x in [1, 2]", "x % 0 == 1", "x / 0 > 1", "x + 99999999999999999999999 > 1"]


def odd_check(draw, kind):
    "A check that may make no sense; None when it is refused"
    one, value = lambda *of: draw(st.sampled_from(of)), st.sampled_from(BOUNDS[kind])
    name = one("type", "not_null", "range", "allowed", "length", "pattern", "unique", "monotonic", "freshness", "expression")
    more = {"range": lambda: {one("min", "max"): draw(value)}, "allowed": lambda: {"values": draw(st.lists(value, min_size=1, max_size=3))}, "length": lambda: {"min": one(0, 2)}, "pattern": lambda: {"pattern": one("a.*", "(?=x)x")},
            "freshness": lambda: {"max_age": one("1d", "99999999999w")}, "expression": lambda: {"expression": one(*RULES)}}.get(name, dict)()
    action = one(None, "null", "clip", "default", "drop")
    try:
        check = Check(check=name, severity=one("critical", "high", "medium", "low"), action=action, default=draw(value) if action == "default" else None, **more)
        return Column(kind=kind, checks=[check]).checks[0]
    except ValueError:
        return None


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.data())
def test_no_column_and_no_check_raises(data):
    "Whatever a column holds and whatever is asked of it: a verdict, frames whose rows add up, a report"
    kind = data.draw(st.sampled_from(list(BOUNDS)))
    checks = [c for c in (odd_check(data.draw, kind) for _ in range(data.draw(st.integers(1, 4)))) if c]
    frame = pd.DataFrame({"x": ODD[data.draw(st.sampled_from(list(ODD)))]})
    result = validate(frame, Schema(columns={"x": Column(kind=kind, checks=checks)}, frame=Frame(unique=data.draw(st.sampled_from([[], [["x"]]])))))
    clean, aside = result.to_arrow()
    assert (result.counts["passed"], result.counts["quarantined"]) == (len(result.clean), len(result.quarantined)) == (clean.num_rows, aside.num_rows)
    assert result.counts["read"] == len(frame) == clean.num_rows + aside.num_rows + result.counts["dropped"] and result._repr_html_() and result.to_dict()
