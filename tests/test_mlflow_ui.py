"""What MLflow's own pages show of our runs, in a headless Chromium."""

import contextlib
import html
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import pytest
from mlflow.tracking import MlflowClient
from test_record import made_up_cell, made_up_record
from test_tracking import prepared_database

from registry import mlflow_client
from registry.compose import Composer
from registry.schema import TrackingConfig
from registry.tracking import Tracker

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on the PATH"),
    pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated"),  # sqlalchemy about MLflow
]

PATIENCE_S = 120  # for what takes seconds on an idle machine
CHROMIUM = (
    *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--window-size=2400,1400", "--virtual-time-budget=15000", "--dump-dom"),
)


@dataclass
class Ui:
    """A running server and what it serves."""

    url: str
    folder: Path
    tracker: Tracker
    experiment: str
    runs: list[str]

    def text(self, page: str, *expected: str) -> str:
        """The words on a page, a tab between two elements, once all that is expected stands there."""
        deadline = time.monotonic() + PATIENCE_S
        words = ""
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = subprocess.run(
                    [*CHROMIUM, f"--user-data-dir={self.folder / 'chromium'}", self.url + page],
                    capture_output=True,
                    text=True,
                    timeout=PATIENCE_S / 2,
                )
                words = visible(done.stdout)
            if all(word in words for word in expected):
                break
        missing = [word for word in expected if word not in words]
        assert not missing, f"{page} does not show {missing} but:\n{words}"
        return words


def visible(dom: str) -> str:
    body = re.sub(r"<(script|style)\b.*?</\1>", "", dom, flags=re.DOTALL)
    return re.sub(r"\s*\t\s*", "\t", html.unescape(re.sub(r"<[^>]+>", "\t", body)))


def wait_until_it_answers(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    pytest.fail(f"no MLflow server: {log.read_text()}")


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory, composer: Composer) -> Iterator[Ui]:
    """Two runs that differ in their quantisation, served."""
    folder = tmp_path_factory.mktemp("ui")
    shutil.copy(prepared_database(tmp_path_factory.getbasetemp()), folder / "mlflow.db")
    config = TrackingConfig("local", f"sqlite:///{folder}/mlflow.db", "rfloor", str(folder / "mlartifacts"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in mlflow_client.QUIET_CLIENT.items():
            patch.setenv(name, value)
        tracker = Tracker(config)
        runs = []
        for name in ("none", "nf4"):
            record = made_up_record(made_up_cell(composer, f"quant={name}"), record_id=name, label=f"cell {name}")
            # The page draws the rows that fit, in alphabetical order: as few as are looked at.
            figures = {key: record.metrics[key] for key in ("median_tpot_ms", "r_floor", "mbu")}
            runs.append(tracker.open(record.record_id, record.label, record.config, {}, record.started_at))
            tracker.close(runs[-1], replace(record, metrics=figures), {})
    experiment = MlflowClient(config.uri).get_experiment_by_name("rfloor").experiment_id
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", folder / "server.log"
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--backend-store-uri", config.uri),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
    ]
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            start_new_session=True,
        )
    try:
        wait_until_it_answers(server, url, log)
        yield Ui(url, folder, tracker, experiment, runs)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_runs_can_be_compared(ui: Ui) -> None:
    runs, experiments = quote(json.dumps(ui.runs)), quote(json.dumps([ui.experiment]))
    page = f"/#/compare-runs?runs={runs}&experiments={experiments}"
    words = ui.text(page, "Comparing 2 Runs", "r_floor", "median_tpot_ms", "step_time_ms")
    for row in ("Run Name:\tcell none\tcell nf4", "quant.name\tnone\tnf4", "quant.study_bits\t16.0\t4.0"):
        assert row in words
    assert "gpu.name\tl4\tl4" in words
    assert "quant.plugin" not in words


def test_the_table_of_runs_has_our_columns(ui: Ui) -> None:
    words = ui.text(ui.tracker.page, "2\tmatching runs", "cell none", "cell nf4")
    for column in ("quant.name", "execution.name", "outcome", "median_tpot_ms", "r_floor", "mbu"):
        assert f"\t{column}\t" in words
    assert "\tnf4\t" in words
    assert "\t0.672576" in words


def test_the_steps_of_a_run_are_a_curve(ui: Ui) -> None:
    """1.9, 2.0 and 2.1 ms over steps 0 to 2: a metric of one point would be a bar without these ticks."""
    page = f"/#/experiments/{ui.experiment}/runs/{ui.runs[0]}/model-metrics?workflowType=machine_learning"
    ui.text(page, "Model metrics", "step_time_ms", "\tStep\t", "\t1.95\t", "\t2.05\t")
