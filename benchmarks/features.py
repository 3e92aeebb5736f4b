"""The feature store: online reads beside raw reads of the same home and beside Feast, historical features beside pandas' merge_asof and Feast.

    .venv/bin/python benchmarks/features.py [ROWS]        (default 1,000,000 rows x 3 views)

Online: 10 features of 1 and of 100 entities. Raw is the least that a client can do: one SELECT or one pipelined HMGET, and the values decoded.
Historical: the time and memory of a process of its own, the best by CPU time of five that take turns; ours joins in memory. Feast (its local provider, files and SQLite or Redis) has
our definitions as `export_feast` writes them, in an environment of its own (tools/peers.py). It joins every row that is asked for with every event
of its entity and filters then: at a million rows of 2,000 entities that was ended by the kernel at 23 GB, so beside Feast there are a tenth of the rows.
Writes benchmarks/results/features.json.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import msgspec

sys.path.append(str(common.ROOT / "tests"))
import servers  # noqa: E402

NAMES = [f"f{i}" for i in range(10)]


def timed(action, n: int) -> dict:
    "Median and 99th percentile, and the CPU time of this process on average, microseconds"
    took, cpu = [], time.process_time()
    for _ in range(n):
        start = time.perf_counter()
        action()
        took.append(time.perf_counter() - start)
    cpu = time.process_time() - cpu
    took.sort()
    return {"p50_us": round(took[n // 2] * 1e6, 1), "p99_us": round(took[n * 99 // 100] * 1e6, 1), "cpu_us": round(cpu / n * 1e6, 1)}


def online(url: str) -> dict:
    "Reads of 1 and of 100 entities, and the raw reads of the same records"
    from mlops_nb.feature_store import FeatureStore, FeatureView
    store = FeatureStore([FeatureView("v", "k", "t", "none.parquet", NAMES)], url)
    store.push("v", [{"k": k, "t": time.time(), **{f: k + i / 3 for i, f in enumerate(NAMES)}} for k in range(10_000)])
    decode, found = msgspec.msgpack.decode, {}
    for n in (1, 100):
        keys, texts = [{"k": 37 * i} for i in range(n)], [f"[{37 * i}]" for i in range(n)]
        if url.startswith("redis"):
            client, at = store.home._redis, [f"mlops_nb:features:v:{t}" for t in texts]

            def raw(client=client, at=at):
                pipe = client.pipeline(transaction=False)
                for key in at:
                    pipe.hmget(key, "event", "entry")
                return [decode(data) for _, data in pipe.execute()]
        else:
            db, ask = store.home._db(), f"SELECT data FROM online WHERE view = 'v' AND key IN ({','.join('?' * n)})"
            raw = lambda db=db, ask=ask, texts=texts: [decode(data) for data, in db.execute(ask, texts)]
        assert len(raw()) == n and all(k.status["f3"] == "present" for k in store.online(keys))
        raw(), store.online(keys)
        found[f"{n} entities"] = {"ours": timed(lambda keys=keys: store.online(keys), 3000 // n + 300), "raw": timed(raw, 3000 // n + 300)}
    return found


MAKE = """import sys
import numpy as np, pandas as pd
rows, folder = int(sys.argv[1]), sys.argv[2]
rng, start = np.random.default_rng(0), np.datetime64('2013-01-01', 'us')
at = lambda n: start + np.sort(rng.integers(0, 365 * 86400, n)).astype('m8[s]')
for v in range(3): pd.DataFrame({f'k{v}': rng.integers(0, 2000, rows), 't': at(rows), **{f'v{v}_{i}': rng.normal(size=rows) for i in range(3)}}).to_parquet(f'{folder}/v{v}.parquet')
pd.DataFrame({'event_time': rng.permutation(at(rows)), **{f'k{v}': rng.integers(0, 2100, rows) for v in range(3)}}).to_parquet(f'{folder}/asked.parquet')
"""
OURS = """import sys, time
import pandas as pd
from mlops_nb.feature_store import FeatureStore, FeatureView
folder = sys.argv[1]
asked = pd.read_parquet(f'{folder}/asked.parquet')
start, cpu = time.perf_counter(), time.process_time()
store = FeatureStore([FeatureView(f'v{v}', f'k{v}', 't', f'{folder}/v{v}.parquet', [f'v{v}_{i}' for i in range(3)], ttl='30d') for v in range(3)], f'{folder}/f.db')
out = store.historical(asked)
"""
PANDAS = """import sys, time
import pandas as pd
folder = sys.argv[1]
asked = pd.read_parquet(f'{folder}/asked.parquet')
start, cpu = time.perf_counter(), time.process_time()
out = asked.assign(_n=range(len(asked))).sort_values('event_time')
for v in range(3): out = pd.merge_asof(out, pd.read_parquet(f'{folder}/v{v}.parquet').sort_values('t', kind='stable').rename(columns={'t': f't{v}'}), left_on='event_time', right_on=f't{v}', by=f'k{v}', allow_exact_matches=False, tolerance=pd.Timedelta('30D'))
out = out.sort_values('_n')
"""
TELL = """
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
import re
print(round(seconds, 2), round(cpu, 2), int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) >> 10, out[[f'v{v}_0' for v in range(3)]].sum().round(6).tolist())"""


FEAST = """import sys, time
import pandas as pd
from feast import FeatureStore
folder = sys.argv[1]
store, asked = FeatureStore(f'{folder}/repository'), pd.read_parquet(f'{folder}/asked.parquet').rename(columns={'event_time': 'event_timestamp'})
asked['event_timestamp'] = asked['event_timestamp'].dt.tz_localize('UTC')
start, cpu = time.perf_counter(), time.process_time()
out = store.get_historical_features(asked, [f'v{v}:v{v}_{i}' for v in range(3) for i in range(3)]).to_df()
"""
FEAST_ONLINE = """import json, time
from feast import FeatureStore
store, found = FeatureStore('.'), {}
for n in (1, 100):
    keys = [{'k': 37 * i} for i in range(n)]
    ask = lambda: store.get_online_features(features=[f'v:f{i}' for i in range(10)], entity_rows=keys).to_dict()
    assert None not in ask()['f3']
    took, cpu = [], time.process_time()
    for _ in range(3000 // n + 300):
        start = time.perf_counter()
        ask()
        took.append(time.perf_counter() - start)
    cpu = time.process_time() - cpu
    took.sort()
    found[f'{n} entities'] = {'p50_us': round(took[len(took) // 2] * 1e6, 1), 'p99_us': round(took[len(took) * 99 // 100] * 1e6, 1), 'cpu_us': round(cpu / len(took) * 1e6, 1)}
print(json.dumps(found))"""


def in_feast(views: list, folder: Path, online: dict | None = None) -> str:
    "Our definitions as a Feast repository that is applied; Feast's Python"
    import peers
    from mlops_nb.feature_store import export_feast
    export_feast(views, folder, online=online)
    python = peers.python_of("feast")
    subprocess.run([Path(python).parent / "feast", "apply"], cwd=folder, check=True, capture_output=True, env={**os.environ, "FEAST_USAGE": "False"})
    return python


def feast_online(folder: Path, online: dict | None = None) -> dict:
    "The same reads by Feast"
    import pandas as pd
    from mlops_nb.feature_store import FeatureView
    rows = pd.DataFrame({"k": range(10_000), "t": pd.Timestamp("2013-01-01"), **{f: [k + i / 3 for k in range(10_000)] for i, f in enumerate(NAMES)}})
    python = in_feast([FeatureView("v", "k", "t", rows, NAMES)], folder, online)
    subprocess.run([Path(python).parent / "feast", "materialize", "2012-12-01T00:00:00", "2013-02-01T00:00:00"], cwd=folder, check=True, capture_output=True)
    return json.loads(subprocess.run([python, "-W", "ignore", "-c", FEAST_ONLINE], cwd=folder, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def historical(rows: int, folder: str, feast: bool = False) -> dict:
    "Seconds, CPU seconds and peak megabytes of each; sums are compared"
    subprocess.run([sys.executable, "-c", MAKE, str(rows), folder], check=True)
    from mlops_nb.feature_store import FeatureView
    views = [FeatureView(f"v{v}", f"k{v}", "t", f"{folder}/v{v}.parquet", [f"v{v}_{i}" for i in range(3)], ttl="30d") for v in range(3)]
    found, sums, programs = {}, {}, {"ours": (sys.executable, OURS), "merge_asof": (sys.executable, PANDAS)}
    if feast:
        programs["Feast"] = (in_feast(views, Path(folder) / "repository"), FEAST)
    for name, (python, program) in [*programs.items()] * 5:
        if name == "Feast" and name in found:                                   # it takes minutes
            continue
        out = subprocess.run([python, "-W", "ignore", "-c", program + TELL, folder], capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        wall, cpu, peak, total = re.fullmatch(r"(\S+) (\S+) (\d+) (.*)", out).groups()
        found[name] = min(found.get(name, {"cpu_s": float("inf")}), {"wall_s": float(wall), "cpu_s": float(cpu), "peak_mb": int(peak)}, key=lambda f: f["cpu_s"])
        sums[name] = [round(x, 3) for x in json.loads(total)]
    assert sums["ours"] == sums["merge_asof"], sums      # Feast also takes what happened at the very moment that is asked for
    return found


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        figures = {"command": "python benchmarks/features.py", "rows": rows, "machine": common.machine("duckdb", "pandas", "redis"), "online, SQLite": online(str(Path(folder) / "online.db"))}
        for n, figure in feast_online(Path(folder) / "feast SQLite").items():
            figures["online, SQLite"][n]["Feast"] = figure
        if servers.binary("redis-server"):
            server = servers.Redis().start()
            figures["online, Redis"] = online(server.url())
            for n, figure in feast_online(Path(folder) / "feast Redis", {"type": "redis", "connection_string": f"127.0.0.1:{server.port}"}).items():
                figures["online, Redis"][n]["Feast"] = figure
            server.close()
        figures["historical, 3 views"] = historical(rows, folder)
        figures[f"historical, 3 views, {rows // 10:,} rows"] = historical(rows // 10, folder, feast=True)
    common.save("features", figures)


if __name__ == "__main__":
    main()
