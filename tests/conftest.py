"Shared by all tests: reproducible property tests, no calls home, the project's root, real servers."
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.update(DVC_NO_ANALYTICS="1", MPLBACKEND="agg", MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true", GOMP_SPINCOUNT="500")
settings.register_profile("repository", derandomize=True, deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
settings.load_profile("repository")

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]
import servers  # noqa: E402


@pytest.fixture(scope="session")
def root() -> Path:
    "The checkout that is tested"
    return ROOT


def server(kind: type[servers.Server], program: str):
    "A running server for a session; its tests are skipped by name where the program is not installed"
    if not servers.binary(program):
        pytest.skip(f"{program} is not installed")
    made = kind().start()
    yield made
    made.close()


@pytest.fixture(scope="session")
def postgres():
    "A PostgreSQL server; `.new_database()` is a URL"
    yield from server(servers.Postgres, "postgres")


@pytest.fixture(scope="session")
def redis():
    "A Redis server; `.url()`"
    yield from server(servers.Redis, "redis-server")


@pytest.fixture(scope="module")
def cluster():
    "A running API server with etcd and controller manager; its tests are skipped by name where it was not built"
    sys.path[:0] = [str(Path(__file__).parent / "rollout")]
    import real_cluster
    if not real_cluster.programs():
        pytest.skip("no API server here; `tools/cluster.sh build` makes one on Debian 12 (needs golang-go, dpkg-dev, etcd-server)")
    made = real_cluster.RealCluster()
    try:
        yield made.start()
    finally:
        made.close()
