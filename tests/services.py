"""A PostgreSQL cluster and an MLflow server of our own: started for real, gone when their test is over."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from sweeps import PATIENCE_S, wait_for


def binaries() -> Path | None:
    """Where Debian keeps PostgreSQL's commands, the newest version's; `None` where there are none."""
    found = [file.parent for file in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(found, key=lambda folder: int(folder.parent.name), default=None)


class Cluster:
    """PostgreSQL on a Unix socket in a folder that nobody else may enter, and on no port.

    Args:
        commands: Of `binaries`.
        home: An empty folder for everything that it keeps. PostgreSQL refuses to run as root and cannot enter
            pytest's folders as anybody else, so for root this is a folder of the user postgres outside of them.
    """

    def __init__(self, commands: Path, home: Path) -> None:
        self._commands = commands
        self.home = home
        # Ends with the process that started it, however that ends.
        self._run_as = ["setpriv", "--pdeathsig", "QUIT"]
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(home, user.pw_uid, user.pw_gid)
            self._run_as += [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        self._server: subprocess.Popen[bytes] | None = None
        self._call("initdb", "--auth=trust", "--username=rfloor", "--no-sync", f"--pgdata={home}/data")

    def _call(self, command: str, *arguments: str) -> None:
        done = subprocess.run(
            [*self._run_as, str(self._commands / command), *arguments],
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        """Start it and wait until it answers."""
        with (self.home / "log").open("ab") as log:
            self._server = subprocess.Popen(
                [
                    *(*self._run_as, str(self._commands / "postgres"), "-D", f"{self.home}/data"),
                    *("-c", "listen_addresses=", "-k", str(self.home), "-c", "fsync=off"),
                ],
                cwd=self.home,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        ready = [str(self._commands / "pg_isready"), "--quiet", f"--host={self.home}"]
        wait_for(lambda: subprocess.run(ready).returncode == 0, "no PostgreSQL")

    def stop(self) -> None:
        """Stop it as a crash would: connections are cut, what was committed is kept."""
        if self._server:
            self._server.send_signal(signal.SIGQUIT)
            self._server.wait(PATIENCE_S)
            self._server = None

    def database(self, name: str) -> str:
        """Make an empty database; its address."""
        self._call("createdb", f"--host={self.home}", "--username=rfloor", name)
        return f"postgresql+psycopg2://rfloor@/{name}?host={self.home}"


@contextlib.contextmanager
def cluster(commands: Path) -> Iterator[Cluster]:
    """A running cluster."""
    home = Path(tempfile.mkdtemp(prefix="rfloor-pg-"))  # a short name: a socket's path has 107 characters
    made = None
    try:
        made = Cluster(commands, home)
        made.start()
        yield made
    finally:
        if made:
            made.stop()
        left = processes_in(home)
        shutil.rmtree(home)
        assert left == []


def processes_in(folder: Path) -> list[str]:
    """Living processes whose working directory lies in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cwd").readlink().is_relative_to(folder):
                found.append((entry / "cmdline").read_text().replace("\0", " "))
    return found


class Server:
    """`mlflow server` on a free port of loopback, artifacts through it.

    Args:
        database: Its backend store.
        home: A folder of its own.
        workers: Its processes. Each opens the database at its first request, and while that is down tries again
            after pauses that double up to a minute, in which it answers nobody: a test that stops the database
            wants one worker, which it has asked something before.
    """

    def __init__(self, database: str, home: Path, workers: int = 1) -> None:
        self._database = database
        self._home = home
        self._workers = workers
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [
            *("setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "mlflow", "server"),
            *("--backend-store-uri", self._database, "--artifacts-destination", f"{self._home}/artifacts"),
            *("--host", "127.0.0.1", "--port", str(self._port), "--workers", str(self._workers)),
        ]
        with (self._home / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self._home,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE_S
        while not self._answers():
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.2)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    def log(self) -> str:
        """What it printed."""
        return (self._home / "server.log").read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all of its processes."""
        assert self._process
        os.killpg(self._process.pid, number)

    def stop(self) -> None:
        """Kill it and all of its workers."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def server(database: str, home: Path, workers: int = 1) -> Iterator[Server]:
    """A running server."""
    made = Server(database, home, workers)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        wait_for(lambda: not processes_in(home), f"a server's processes are left: {processes_in(home)}")
