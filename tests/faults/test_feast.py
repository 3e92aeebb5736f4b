"The real Feast, in an environment of its own: our definitions run there, and its feature server stands behind our protocol."
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import peers
import pytest
import servers

from mlops_nb.feature_store import FeatureStore, FeatureView, export_feast
from mlops_nb.core import MlopsError

pytestmark = pytest.mark.drill
UNTIL = datetime(2013, 1, 15, tzinfo=UTC)
ASK = """
import sys
import pandas as pd
from feast import FeatureStore
store, asked = FeatureStore("."), pd.read_parquet("asked.parquet")
found = store.get_historical_features(asked, ["carrier_delay:delay", "carrier_delay:flights", "aircraft:last"]).to_df()
found.to_parquet("found.parquet")
"""


class FeatureServer(servers.Server):
    "`feast serve`"
    def __init__(self, feast: str, repository: Path) -> None:
        super().__init__()
        self.feast, self.repository = feast, repository

    def command(self) -> list[str]:
        return [self.feast, "-c", str(self.repository), "serve", "--host", "127.0.0.1", "--port", str(self.port), "--no-access-log", "--workers", "1"]

    def start(self) -> "FeatureServer":
        "It takes longer than others to import what it needs"
        import time
        self.process = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=(self.folder / "log").open("ab"), stderr=subprocess.STDOUT, start_new_session=True)
        end = time.monotonic() + 180
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < end, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.1)
        return self


@pytest.fixture(scope="module")
def python():
    return peers.python_of("feast")


def feast(python, repository, *words):
    "A command of Feast"
    done = subprocess.run([Path(python).parent / "feast", *words], cwd=repository, capture_output=True, text=True, env={**os.environ, "FEAST_USAGE": "False"}, timeout=300)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]


def make_views():
    rng, n = np.random.default_rng(0), 400
    at = pd.Timestamp("2013-01-01") + pd.to_timedelta(rng.permutation(20 * 1440)[:n], unit="min")
    rows = pd.DataFrame({"carrier": rng.choice(["UA", "DL", "AA"], n), "tail": rng.integers(1, 30, n), "arrived": at, "delay": rng.normal(5, 30, n).round(), "flights": rng.integers(1, 9, n)})
    return [FeatureView("carrier_delay", "carrier", "arrived", rows, ["delay", "flights"], ttl="3d", owner="scheduling", description="of the last flight"),
            FeatureView("aircraft", "tail", "arrived", rows, ["last"], ttl="12h", query="SELECT tail, arrived, delay * 2 AS last FROM source")]


@pytest.mark.parametrize("where", ["sqlite", pytest.param("redis", marks=pytest.mark.soak)])
def test_our_definitions_run_in_feast_and_feast_stands_behind_our_protocol(tmp_path, python, request, where):
    views, repository = make_views(), tmp_path / "repository"
    online = {"type": "redis", "connection_string": f"127.0.0.1:{request.getfixturevalue('redis').port}"} if where == "redis" else None
    export_feast(views, repository, online=online)
    feast(python, repository, "apply")
    feast(python, repository, "materialize", "2012-12-01T00:00:00", UNTIL.strftime("%Y-%m-%dT%H:%M:%S"))

    rng = np.random.default_rng(1)
    asked = pd.DataFrame({"carrier": rng.choice(["UA", "DL", "AA", "ZZ"], 60), "tail": rng.integers(1, 40, 60), "row": range(60),
                          "event_timestamp": pd.Timestamp("2013-01-01", tz="UTC") + pd.to_timedelta(rng.permutation(20 * 86400)[:60] + .5, unit="s")})
    ours = FeatureStore(views, str(tmp_path / "f.db"))
    expected = ours.historical(asked, "event_timestamp")
    asked.to_parquet(repository / "asked.parquet")
    subprocess.run([python, "-c", ASK], cwd=repository, check=True, capture_output=True, timeout=300)
    found = pd.read_parquet(repository / "found.parquet").sort_values("row")
    for f in ("delay", "flights", "last"):
        np.testing.assert_array_equal(found[f].to_numpy(float), expected.loc[found.row, f].to_numpy(float))

    ours.materialize(UNTIL)
    server = FeatureServer(str(Path(python).parent / "feast"), repository)
    try:
        server.start()
        theirs = FeatureStore(views, f"feast+http://127.0.0.1:{server.port}")
        theirs.home._http.timeout = 60      # the first answer imports things, on a machine that others use too
        keys = [{"carrier": c, "tail": t} for c in ("UA", "DL", "AA", "ZZ") for t in (1, 7, 29, 99)] + [{"carrier": "UA"}, {"tail": None}]
        assert theirs.online(keys, now=UNTIL.timestamp()) == ours.online(keys, now=UNTIL.timestamp())
        theirs.push("carrier_delay", [{"carrier": "UA", "arrived": "2013-01-15T10:00", "delay": 77.0, "flights": 3}])
        later = theirs.online([{"carrier": "UA"}], ["delay"], now=UNTIL.timestamp() + 86400)[0]
        assert later.values == {"delay": 77.0} and later.age["carrier_delay"] == 14 * 3600
        theirs.push("carrier_delay", [{"carrier": "UA", "arrived": "2013-01-15T11:00", "delay": None, "flights": 4}, {"carrier": "DL", "arrived": "2013-01-15T11:00", "delay": 1.0, "flights": 5}])
        lacking = theirs.online([{"carrier": "UA"}], ["delay", "flights"], now=UNTIL.timestamp() + 86400)[0]
        assert (lacking.values, lacking.status["delay"]) == ({"delay": None, "flights": 4}, "missing")
        server.kill()
        with pytest.raises(MlopsError, match="feature server does not answer"):
            theirs.online(keys)
    finally:
        server.close()
        ours.home.close()
