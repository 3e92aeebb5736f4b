"Shared by all tests: reproducible property tests, no calls home, the project's root."
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.update(DVC_NO_ANALYTICS="1", MPLBACKEND="agg", MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")
settings.register_profile("repository", derandomize=True, deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
settings.load_profile("repository")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))


@pytest.fixture(scope="session")
def root() -> Path:
    "The checkout that is tested"
    return ROOT
