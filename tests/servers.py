"Real servers for the tests: started on loopback at a free port, stopped or killed at will, their data in a temporary folder."
import contextlib
import glob
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest


# A server listens a moment after its port was chosen, and again after it was killed. So that nobody else has the port by then: each worker of pytest has a range of its own, goes
# through it from one to the next, and the range is none that the kernel gives to connections, nor that of `mlops_nb.rollout.processes`.
_RANGE = 1000
_FIRST = 10_000 + _RANGE * int(os.environ.get("PYTEST_XDIST_WORKER", "gw9")[2:])
_TURNS = itertools.count(os.getpid())


def free_port() -> int:
    "A port of loopback that nobody has, nor will have before its server"
    for turn in itertools.islice(_TURNS, _RANGE):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)         # what lingers of closed connections is in nobody's way
            s.bind(("127.0.0.1", _FIRST + turn % _RANGE))
            s.listen()
            return s.getsockname()[1]
    raise RuntimeError("no port is free")


def binary(name: str) -> str | None:
    "Where a program is, also where Debian hides PostgreSQL's"
    return shutil.which(name) or next(iter(sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True)), None)


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    "A file system of its own in a new folder, such as 600k; needs root"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here (no root?)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


class Server:
    "A server process that a test may kill and start again"
    def __init__(self) -> None:
        self.folder, self.port, self.process = Path(tempfile.mkdtemp(prefix="server-")), free_port(), None

    def command(self) -> list[str]:
        raise NotImplementedError

    def answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return True
        except OSError:
            return False

    def start(self) -> "Server":
        "Start and wait until it answers"
        self.process = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=(self.folder / "log").open("ab"), stderr=subprocess.STDOUT, start_new_session=True)
        end = time.monotonic() + 180
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError((self.folder / "log").read_text()[-2000:])
            time.sleep(0.02)
        return self

    def kill(self, sig: int = signal.SIGKILL) -> None:
        "End the server and what it started, and wait until the last of it is gone; SIGKILL takes it away at once"
        if self.process and self.process.poll() is None:
            started = psutil.Process(self.process.pid).children(recursive=True)
            os.killpg(self.process.pid, sig)
            self.process.wait(180)
            psutil.wait_procs(started, 30)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Postgres(Server):
    "PostgreSQL; as root it runs as the user postgres, since it refuses root"
    def __init__(self) -> None:
        super().__init__()
        self.user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        if self.user:
            shutil.chown(self.folder, "postgres")
        self.data = self.folder / "data"
        subprocess.run([*self.user, binary("initdb"), "-D", self.data, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8"], check=True, capture_output=True, cwd=self.folder)

    def command(self) -> list[str]:
        return [*self.user, binary("postgres"), "-D", str(self.data), "-p", str(self.port), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]

    def kill(self, sig: int = signal.SIGKILL) -> None:
        "A killed server leaves its pid file, and where nobody reaps it its pid: the next start would take it for alive"
        super().kill(sig)
        self.data.joinpath("postmaster.pid").unlink(missing_ok=True)

    def answers(self) -> bool:
        return subprocess.run([binary("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]).returncode == 0

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        "URL of a new, empty database"
        name = f"t{os.urandom(6).hex()}"
        subprocess.run([binary("createdb"), "-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", name], check=True)
        return self.url(name)


class Redis(Server):
    "Redis, nothing written to disk"
    def command(self) -> list[str]:
        return [binary("redis-server"), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder)]

    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"
