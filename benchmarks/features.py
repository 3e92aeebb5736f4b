"""The feature store: online reads beside raw reads of the same home, historical features beside pandas' merge_asof.

    .venv/bin/python benchmarks/features.py [ROWS]        (default 1,000,000 rows x 3 views)

Online: 10 features of 1 and of 100 entities. Raw is the least that a client can do: one SELECT or one pipelined HMGET, and the values decoded.
Historical: the time and memory of a process of its own; DuckDB with its default memory. Writes benchmarks/results/features.json.
"""
import json
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
    "Median and 99th percentile, microseconds"
    took = []
    for _ in range(n):
        start = time.perf_counter()
        action()
        took.append(time.perf_counter() - start)
    took.sort()
    return {"p50_us": round(took[n // 2] * 1e6, 1), "p99_us": round(took[n * 99 // 100] * 1e6, 1)}


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
                    pipe.hmget(key, "event", "data")
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


def historical(rows: int, folder: str) -> dict:
    "Seconds, CPU seconds and peak megabytes of both; their sums are compared"
    subprocess.run([sys.executable, "-c", MAKE, str(rows), folder], check=True)
    found, sums = {}, set()
    for name, program in (("ours", OURS), ("merge_asof", PANDAS)):
        out = subprocess.run([sys.executable, "-c", program + TELL, folder], capture_output=True, text=True, check=True).stdout
        wall, cpu, peak, total = re.fullmatch(r"(\S+) (\S+) (\d+) (.*)\n", out).groups()
        found[name] = {"wall_s": float(wall), "cpu_s": float(cpu), "peak_mb": int(peak)}
        sums.add(str([round(x, 3) for x in json.loads(total)]))
    assert len(sums) == 1, sums
    return found


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        figures = {"command": "python benchmarks/features.py", "rows": rows, "machine": common.machine("duckdb", "pandas", "redis"), "online, SQLite": online(str(Path(folder) / "online.db"))}
        if servers.binary("redis-server"):
            server = servers.Redis().start()
            figures["online, Redis"] = online(server.url())
            server.close()
        figures["historical, 3 views"] = historical(rows, folder)
    common.save("features", figures)


if __name__ == "__main__":
    main()
