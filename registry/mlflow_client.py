"""MLflow's client as a sweep needs it: quiet, patient with what passes, and told in one line when it is down."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from registry import faults
from registry.locks import locked
from registry.patience import persist
from registry.redact import redact
from registry.validate import SERVERS, sqlite_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

QUIET_CLIENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # no background thread beside a timed child
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # rfloor asks again itself: see `Tracker._create_run`
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",  # seconds; a server that hangs is told within them, not within minutes
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # of every run that ends on a server
    "PGCONNECT_TIMEOUT": "10",  # seconds, libpq's own, for a PostgreSQL that is reached without a server
}
PATIENCE_S = 12.0
"""How long one call of MLflow may fail before it is left alone. The attempt that is under way then may last longer: a
request its 15 s, and where somebody keeps an SQLite database locked MLflow itself waits for 20."""
OPENING_S = 60.0
"""How long others may be at opening the same SQLite database; the first makes its tables, which takes seconds."""
PASSING = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED")
"""MLflow's codes for what may be gone a little later; it gives the first to a server that does not answer, too."""


class TrackingDown(Exception):
    """MLflow could not be reached or did not take a run; the record is safe on disk."""


class PatientClient:
    """MLflow's client at one address.

    Raises:
        TrackingDown: MLflow is not installed, or nobody answers.
    """

    def __init__(self, uri: str) -> None:
        for name, value in QUIET_CLIENT.items():
            os.environ.setdefault(name, value)
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # not even where somebody wants more of them
        import logging

        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise TrackingDown(f"mlflow cannot be imported: {error}") from error

        logging.getLogger("alembic").setLevel(logging.WARNING)
        for name in ("mlflow.store.db.utils", "urllib3.connectionpool"):  # what fails is raised, and told once
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if not uri.startswith(SERVERS):
            import mlflow.store.db.utils as databases

            databases.MAX_RETRY_COUNT = 1  # its ten attempts take 101 s, and no setting says otherwise
        self._uri = uri
        self.client = self.ask(MlflowClient, uri)

    def ask(self, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Call MLflow, again while what it raises may pass; in the end that becomes `TrackingDown`, in one line."""
        start = time.monotonic()
        try:
            faults.disk(faults.MLFLOW_FULL)
            return persist(lambda: call(*arguments, **keywords), _may_pass, PATIENCE_S)
        except TrackingDown:
            raise
        except Exception as error:
            raise TrackingDown(_cause(error, self._uri, time.monotonic() - start)) from error


@contextmanager
def opened(uri: str) -> Iterator[PatientClient]:
    """A client, and where it opens an SQLite database no other rfloor of this machine at it for as long.

    MLflow makes its tables without asking whether somebody is at it, and what two make at once may stay broken. The
    folder is held and not the file, whose locks are SQLite's own business. A server of MLflow's that makes the same
    tables at that moment is not kept out.

    Raises:
        TrackingDown: Others are at it all the time, or MLflow cannot be reached.
    """
    with ExitStack() as stack:
        if file := sqlite_file(uri):
            try:
                stack.enter_context(locked(file.resolve().parent, OPENING_S))
            except TimeoutError as error:
                raise TrackingDown(f"others have been opening {file} for {OPENING_S:.0f} s") from error
        yield PatientClient(uri)


def forget(run_id: str) -> None:
    """Let go of what MLflow keeps of each run that got an artifact: a thread pool and a queue, some 20 kB."""
    from mlflow.tracking._tracking_service import utils

    getattr(utils, "_artifact_repos_cache", {}).pop(run_id, None)


def _may_pass(error: Exception) -> bool:
    """Whether MLflow may be only busy, locked or starting.

    What a database raises reaches us unwrapped while it is opened: it is down, or another process makes its tables.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import DBAPIError

    if isinstance(error, MlflowException):
        return error.error_code in PASSING
    return isinstance(error, DBAPIError)


def _cause(error: Exception, uri: str, seconds: float) -> str:
    """Why MLflow failed, in one line without secrets."""
    file = sqlite_file(uri)
    if file and "database is locked" in str(error):
        return f"another process has kept {file} locked for {seconds:.0f} s"
    return redact(str(error).splitlines()[0]) if str(error) else type(error).__name__
