"""Canaries: recognisable secrets in the environment, in addresses and in values, looked for in all that is left."""

import dataclasses
import gzip
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from mlflow.tracking import MlflowClient
from planning import CPU, Plan
from sweeps import FAULTS, PATIENCE_S, ROOT, Start, Sweep, assert_logged, assert_nothing_left, words
from test_record import made_up_cell, made_up_record
from test_tracking import prepared_database

from registry import cli, logs, run, sweep, traces
from registry import record as records
from registry.call import Call
from registry.compose import Composer
from registry.identity import cell_id
from registry.importing import import_records
from registry.outcome import BadInput, Outcome
from registry.redact import HIDDEN, Redactor
from registry.schema import TrackingConfig
from registry.validate import validate

# sqlalchemy about what MLflow does
pytestmark = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated")

ENVIRONMENT = {
    "HF_TOKEN": "hf_kanaryENVABCDEFGHIJKLMNOPQRSTUVWX",
    "AWS_SECRET_ACCESS_KEY": "kanary/AWS+secret/0123456789abcdefABCDEF",
    "AWS_ACCESS_KEY_ID": "AKIAKANARY0123456789",
    "MLFLOW_TRACKING_PASSWORD": "swordfish",
    "PGPASSWORD": "k4nry",
    "SOME_PASSPHRASE": "knarykanary",
    "SMS_TOKEN": "90817263544",
    "OPENAI_API_KEY": "sk-proj-kanary0123456789-abcdefghijklmn",
    "GH_TOKEN": "ghp_kanary0123456789abcdefghijABCDEFGHIJ",
    "ODD_SECRET": "kanary of odd words, \"quoted\" and 'quoted'",
    "KAGGLE_KEY": "0kanary1kaggle2kanary3",
    "AZURE_OPENAI_KEY": "0kanary1azure2kanary3",
    "SSHPASS": "k4nary-ssh",
    "REDIS_AUTH": "k4nary-redis",
    "DBPASSWORD": "k4nary-database",
    "HF_TOKENS": "k4nary-one,k4nary-two",
    "DATABASE_URL": "postgresql://me:kanary%2Fdatabase@host/db",
}
OPTIONS = {
    "api_key": "kanary-option-api-key",
    "password": "opensesame",
    "token": "kanary-option-token",
    "pwd": "kanary-option-pwd",
}
NOTES = {
    "hub": "hf_kanaryNOTEABCDEFGHIJKLMNOPQRSTUVWX",
    "web token": "eyJrYW5hcnkiOjF9.eyJrYW5hcnkiOjF9.kanary-signature-0123456789",
    "header": "Authorization: Bearer kanary-bearer",
    "pem": "-----BEGIN PRIVATE KEY-----kanaryABCDEF-----END PRIVATE KEY-----",
    "url": "https://me:kanary-note@host/x?token=kanary-parameter",
}
PASSWORD = "kanary-in-the-address"
CANARIES = [
    *(value for name, value in ENVIRONMENT.items() if name != "DATABASE_URL"),
    *("kanary/database", "kanary%2Fdatabase", "kanary of odd words"),
    *OPTIONS.values(),
    *("hf_kanaryNOTE", "kanary-signature", "kanary-bearer", "kanaryABCDEF", "kanary-note", "kanary-parameter"),
    PASSWORD,
]


def leaked(text: bytes) -> list[str]:
    """The canaries in it, however they are spelt."""
    found = []
    for canary in CANARIES:
        spellings = {canary, quote(canary), quote(canary, safe=""), json.dumps(canary)[1:-1], repr(canary)[1:-1]}
        if any(spelt.encode() in text for spelt in spellings):
            found.append(canary)
    return found


def assert_kept(*places: Path | str) -> None:
    """No canary is in any byte of these folders and texts, nor in a name."""
    for place in places:
        if isinstance(place, str):
            assert leaked(place.encode()) == [], place
            continue
        for file in place.rglob("*"):
            assert leaked(str(file.relative_to(place)).encode()) == [], file
            if file.is_file():
                content = file.read_bytes()
                assert leaked(gzip.decompress(content) if file.suffix == ".gz" else content) == [], file


def options(note: str) -> list[str]:
    quoted = note.replace("'", r"\'")
    return [
        *(f"+backend.options.{name}={value}" for name, value in OPTIONS.items()),
        f"+backend.options.note='{quoted}'",
    ]


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


# Whole sweeps

TALKATIVE = {
    "talks": ("crash", "^ValueError: cannot use TalkativeOptions"),
    "talks-and-dies": ("crash", "ended with code 3 and no answer; its last words: cannot use TalkativeOptions"),
    "talks-in-refusal": ("unsupported", "^cannot use TalkativeOptions"),
    "talks-beforehand": ("crash", "asking the backend plugin 'talks-beforehand' raised ValueError: no Talkative"),
    "talks-and-decodes": ("ok", "^$"),
}


@pytest.fixture(scope="module")
def talked(start: Start) -> Sweep:
    return start(f"backend={','.join(TALKATIVE)}", *options(" and ".join(NOTES.values()))).end()


def test_no_secret_is_left_anywhere(talked: Sweep) -> None:
    assert talked.code == 1, talked.stderr
    assert len(talked.records()) == len(TALKATIVE)
    assert_kept(talked.stdout, talked.stderr, talked.home)
    assert_nothing_left(talked)


def test_what_is_no_secret_is_told(talked: Sweep) -> None:
    for name, (outcome, reason) in TALKATIVE.items():
        record = talked.record(name)
        assert record["outcome"] == outcome
        assert re.search(reason, record["reason"])
        assert_logged(talked, record)
        assert record["config"]["backend"]["options"]["api_key"] == HIDDEN
        if name != "talks-beforehand":
            log = talked.log(record)
            assert f"HF_TOKEN={HIDDEN}" in log
            assert f"RFLOOR_TEST_MARK={talked.mark}" in log, "and the rest of the environment is as it was"


def test_a_log_is_as_readable_as_a_record(talked: Sweep) -> None:
    files = [*talked.folder.glob("records/*/*")]
    assert {file.suffix for file in files} == {".json", ".log"}
    assert len({stat.S_IMODE(file.stat().st_mode) for file in files}) == 1


def test_no_secret_is_left_in_the_trace_of_profiled_steps(start: Start) -> None:
    """Whose annotations a plugin names as it pleases; beside the record and in MLflow."""
    call = start("backend=annotates", *options(NOTES["url"]), "protocol.profiled_steps=3").end()
    assert call.code == 0, call.stderr
    found = [*call.home.rglob("*trace.json.gz")]
    assert len(found) == 2
    for trace in found:
        names = [event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
        assert f"step of {HIDDEN} and {HIDDEN}" in names
    assert_kept(call.stdout, call.stderr, call.home)


@pytest.fixture
def dead() -> Iterator[str]:
    """A host at which nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@pytest.mark.parametrize(
    ("scheme", "cell"),
    [("http://me:{}@{}", "backend=talks"), ("postgresql://me:{}@{}/db", "backend=talks-beforehand")],
    ids=["server", "database"],
)
def test_no_secret_is_left_where_mlflow_is_down(
    start: Start, dead: str, scheme: str, cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = scheme.format(PASSWORD, dead)
    call = start(cell, *options(NOTES["url"]), f"tracking.uri={uri}", "hydra.verbose=true").end()
    assert call.code == 1
    assert "MLflow did not take every run" in words(call.stdout)
    assert f"***@{dead}" in call.stdout
    assert_kept(call.stdout, call.stderr, call.home)
    assert_nothing_left(call)


@pytest.mark.parametrize(
    "overrides",
    [
        [f"tracking.uri='http://me:{PASSWORD}@host/?x=1'"],
        [f"tracking.uri=htp://me:{PASSWORD}@host"],
        [f"tracking.uri='http://host?token={PASSWORD}'"],
        [f"tracking.artifacts=s3://me:{PASSWORD}@bucket/x"],
        [f"tracking.artifacts='https://bucket/x?sig={PASSWORD}'"],
        [f"+quant.options.api_key={PASSWORD}"],
        [f"+backend.options.token={PASSWORD}", "backend=refuses"],
        [f"+backend.options.pasword={PASSWORD}", "backend=talks"],
        [f"backend.options.password={PASSWORD}", "backend=talks"],
        [f"+backend.options={{password:{PASSWORD}}}", "backend=talks"],
        [f"+backend.options.password={PASSWORD}", "backend=talks", "modle=tiny"],
        [f"+backend.options.password={PASSWORD}", "backend=talks", "protocol.seed=-1,-2"],
        [f"+backend.options.api_key={PASSWORD},x y=", "backend=talks"],
        [f"+backend.options.password={PASSWORD}", "backend=talks", "model.weights=${oc.env:ODD_SECRET}"],
        ["model.weights=${oc.env:HF_TOKEN}"],
        ["gpu.peak_bandwidth_gbs=${oc.env:AWS_SECRET_ACCESS_KEY}"],
        ["records=/dev/null/${oc.env:ODD_SECRET}"],
        [f"tracking.experiment={NOTES['hub']}"],
        [f"model.name={NOTES['hub']}"],
        ["quant.name=${oc.env:OPENAI_API_KEY}"],
        [f"--token={PASSWORD}"],
    ],
    ids=range(21),
)
def test_no_secret_is_in_a_refusal(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FAULTS)
    sweep._composer.cache_clear()
    try:
        with pytest.raises(SystemExit, match="2"):
            sweep.prepare(["-m", "model=tiny", "gpu=cpu", *overrides])
    finally:
        sweep._composer.cache_clear()
    out, err = capsys.readouterr()
    assert (out, err[:8]) == ("", "rfloor: ")
    assert_kept(err, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_secret_is_in_the_refusal_of_a_whole_call(start: Start) -> None:
    call = start("backend=talks", *options(NOTES["url"]), "modle=tiny").end()
    assert call.code == 2, call.stdout
    assert_kept(call.stdout, call.stderr, call.home)
    assert_nothing_left(call)


@pytest.mark.parametrize("flag", [["--cfg", "job"], ["--cfg", "all"], ["--help"], ["--cfg", "job", "--resolve"]])
def test_no_secret_is_in_a_configuration_that_is_only_shown(tmp_path: Path, flag: list[str]) -> None:
    """It is shown to be passed on."""
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "runner.py"), *flag, "model=tiny"),
            *(f"+backend.options.{name}={value}" for name, value in OPTIONS.items()),
            *(f"tracking.uri=http://me:{PASSWORD}@host", f"+quant.options.note='{NOTES['pem']}'"),
            *("+quant.options.a=${oc.env:ODD_SECRET}", "protocol.seed=7"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert "seed: 7" in done.stdout
    assert "http://***@host" in done.stdout
    assert_kept(done.stdout, done.stderr, tmp_path)


def test_where_mlflow_is_may_come_from_the_environment(start: Start, tmp_path: Path, template: Path) -> None:
    """Which keeps its password off the command line; it is used, and not stored."""
    shutil.copy(template, tmp_path / f"{PASSWORD}.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/{PASSWORD}.db")
        call = start("execution=cuda_graph", "tracking.uri=${oc.env:MLFLOW_TRACKING_URI}").end()
    assert call.code == 0, call.stderr
    client = MlflowClient(f"sqlite:///{tmp_path}/{PASSWORD}.db")
    assert len(client.search_runs([client.get_experiment_by_name("rfloor").experiment_id])) == 1
    assert_kept(call.home)


def test_a_variable_that_is_not_set_is_bad_input(composer: Composer) -> None:
    with pytest.raises(BadInput, match="NO_SUCH_VARIABLE"):
        composer.cell(["tracking.uri=${oc.env:NO_SUCH_VARIABLE}"])


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_database(tmp_path_factory.getbasetemp())


# The worker's log


def test_what_a_killed_call_leaves_is_its_user_s_alone_and_withheld_by_the_next(start: Start) -> None:
    killed = start("backend=talks", *options(NOTES["url"]), "+backend.options.hangs=true")
    killed.until_it_hangs()
    for file in killed.folder.glob(f"records/{'[0-9a-f]' * 16}/*"):
        assert file.name.startswith(".")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.end()
    assert_kept(killed.stdout, killed.stderr, *killed.folder.glob("tmp"))
    with pytest.MonkeyPatch.context() as patch:  # whoever comes next knows nothing of these secrets
        for name in ENVIRONMENT:
            patch.delenv(name)
        following = start("execution=cuda_graph", f"records={killed.folder}/records").end()
    assert following.code == 0, following.stderr
    assert_kept(following.home)
    [log] = killed.folder.glob("records/*/*.log")
    [line] = log.read_text().splitlines()
    assert line.startswith(f"rfloor: {logs.WITHHELD} (")
    assert not [*killed.folder.glob("records/*/.*")]


def test_a_log_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "cell" / "sweep-0.log"
    with logs.opened(file) as output:
        output.write(b"HF_TOKEN=kanary")
        output.flush()
        logs.finish_abandoned(tmp_path)
        assert not file.exists()
    assert file.read_bytes() == b"HF_TOKEN=***"
    assert [*file.parent.iterdir()] == [file]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nothing secret\n",
        b"\xff\xfe\x00 50%\r\xe2\x82",
        b"x" * 5_000_000,
        b"a line of a long log\n" * 400_000,
    ],
    ids=range(5),
)
def test_a_log_without_secrets_is_kept_byte_by_byte(tmp_path: Path, content: bytes) -> None:
    with logs.opened(tmp_path / "a.log") as output:
        output.write(content)
    assert (tmp_path / "a.log").read_bytes() == content


PIECE = 2 * logs.KEY_REACH
"""Bytes that are looked at at a time, where a test writes many logs of some pieces."""


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "CHUNK", PIECE)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("at", [0, 1, 1000, *range(PIECE - 60, PIECE + 5), 3 * PIECE - 20])
@pytest.mark.parametrize("separator", [b"\n", b"."], ids=["lines", "one line"])
def test_a_secret_is_found_wherever_it_stands_in_a_log(tmp_path: Path, at: int, separator: bytes) -> None:
    filler = (b"ordinary" + separator) * (at // 9 + 1)
    secret = ENVIRONMENT["HF_TOKEN"].encode()
    with logs.opened(tmp_path / "a.log") as output:
        output.write(filler[:at] + b" " + secret + b" " + filler)
    assert (tmp_path / "a.log").read_bytes() == filler[:at] + b" *** " + filler


@pytest.mark.usefixtures("small_pieces")
def test_a_private_key_is_hidden_across_the_pieces_of_a_log(tmp_path: Path) -> None:
    key = b"-----BEGIN PRIVATE KEY-----\n" + b"a2FuYXJ5a2FuYXJ5\n" * 80 + b"-----END PRIVATE KEY-----\n"
    for before in range(PIECE - len(key) - 30, PIECE + 30, 41):
        with logs.opened(tmp_path / "a.log") as output:
            output.write((b"x" * 40 + b"\n") * (before // 41) + key + b"after\n")
        text = (tmp_path / "a.log").read_bytes()
        assert b"a2FuYXJ5" not in text
        assert text.endswith(b"after\n")


def test_a_log_that_cannot_be_cleaned_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with logs.opened(tmp_path / "a.log") as output:
        output.write(b"HF_TOKEN=kanary")
        monkeypatch.setattr("registry.logs.clean", full)
    assert (
        tmp_path / "a.log"
    ).read_text() == "rfloor: the log could not be cleaned of secrets: No space left on device\n"
    assert [file.name for file in tmp_path.iterdir()] == ["a.log"]


# A trace


@pytest.mark.parametrize(
    "content",
    [b"HF_TOKEN=kanary", gzip.compress(b"HF_TOKEN=kanary"), gzip.compress(b"{}")[:-6]],
    ids=["plain", "no JSON", "cut off"],
)
def test_a_trace_that_cannot_be_cleaned_is_not_kept(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "raw").write_bytes(content)
    assert not traces.clean(tmp_path / "raw", tmp_path / "clean", Redactor())
    assert not (tmp_path / "clean").exists()


def test_a_trace_without_secrets_stays_as_it_is(tmp_path: Path) -> None:
    content = {"traceEvents": [{"name": "aten::mm", "ts": 1.25, "dur": 1e-3, "args": {"External id": 7}}]}
    (tmp_path / "raw").write_bytes(gzip.compress(json.dumps(content).encode()))
    assert traces.clean(tmp_path / "raw", tmp_path / "clean", Redactor(["kanary"]))
    assert json.loads(gzip.decompress((tmp_path / "clean").read_bytes())) == content


# A reason


@pytest.mark.parametrize("before", range(run.REASON_LIMIT - 50, run.REASON_LIMIT + 2, 7))
def test_a_reason_is_cut_once_it_holds_no_secret(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    told = "x" * before + " " + ENVIRONMENT["AWS_SECRET_ACCESS_KEY"] + " after"
    monkeypatch.setattr(run, "ask", lambda *_: {"outcome": Outcome.CRASH, "reason": told, "remedy": told})
    cell = plan("model=tiny", "context=64", f"records={tmp_path}", device=CPU)
    record = run.run_cell(cell, 0, 0, Call("sweep", None, lambda _: None))
    assert record.reason == record.remedy
    assert "kan" not in record.reason
    assert len(record.reason) <= run.REASON_LIMIT + len("...")


# What others recorded


def test_an_import_tells_mlflow_no_secret(tmp_path: Path, template: Path, composer: Composer) -> None:
    """Of records and logs that another version of rfloor, or another hand, wrote."""
    shutil.copy(template, tmp_path / "mlflow.db")
    folder = tmp_path / "records"
    told = " ".join([*ENVIRONMENT.values(), *NOTES.values(), *(f"{k}={v}" for k, v in OPTIONS.items())])
    record = made_up_record(made_up_cell(composer), label=told[:200], warnings=[told], reason=told, remedy=told)
    record.config["backend"]["options"] = OPTIONS | {"note": NOTES["url"]}
    record.environment["tags"] = {"told": told}
    record.measured = {"kernels": {ENVIRONMENT["HF_TOKEN"]: 1}, "told": told, "password": 123456789}
    file = records.write(record, folder)
    file.with_suffix(".log").write_text(told)
    records.trace_path(file).write_bytes(gzip.compress(json.dumps({"traceEvents": [{"name": told}]}).encode()))
    config = TrackingConfig("local", f"sqlite:///{tmp_path}/mlflow.db", "rfloor", str(tmp_path / "mlartifacts"))
    assert import_records(folder, config)[0]["imported"] == 1
    shutil.rmtree(folder)
    assert_kept(tmp_path)
    [artifact] = tmp_path.glob("mlartifacts/**/cell.json")
    [trace] = tmp_path.glob("mlartifacts/**/trace.json.gz")
    assert HIDDEN in gzip.decompress(trace.read_bytes()).decode()
    kept = records.read(artifact)
    assert kept.metrics == record.metrics
    assert kept.step_times_ms == record.step_times_ms
    assert kept.config["backend"]["options"]["api_key"] == HIDDEN
    assert kept.measured["password"] == HIDDEN


def test_an_import_without_its_server_tells_no_secret(
    tmp_path: Path, dead: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert cli.main(["import", str(tmp_path), f"tracking.uri=http://me:{PASSWORD}@{dead}"]) == 1
    assert_kept(*capsys.readouterr())


# What is stored beside


def test_a_secret_is_no_part_of_a_cell_s_identity(composer: Composer) -> None:
    """Another token makes no other measurement, and a hash would let a weak password be guessed."""
    cell = made_up_cell(composer)
    found = set()
    for token in ("kanary-1", "kanary-2"):
        config = dataclasses.replace(cell.config.backend, options={"token": token, "size": 1})
        found.add(cell_id(dataclasses.replace(cell.config, backend=config), cell.device, {}, {}, {}, {}))
    assert len(found) == 1
    config = dataclasses.replace(cell.config.backend, options={"token": token, "size": 2})
    assert cell_id(dataclasses.replace(cell.config, backend=config), cell.device, {}, {}, {}, {}) not in found


@pytest.mark.parametrize("key", ["tracking.experiment", "model.name", "quant.name", "gpu.name"])
def test_a_name_that_looks_like_a_secret_is_refused(composer: Composer, key: str) -> None:
    with pytest.raises(BadInput) as caught:
        validate(composer.cell([f"{key}={NOTES['hub']}"]))
    assert str(caught.value) == f"{key}=***: looks like a secret, and is shown everywhere"


def test_a_password_of_the_artifacts_is_refused_since_mlflow_would_store_it(composer: Composer) -> None:
    with pytest.raises(BadInput) as caught:
        validate(composer.cell([f"tracking.artifacts=s3://me:{PASSWORD}@bucket/x"]))
    assert "tracking.artifacts=s3://***@bucket/x" in str(caught.value)
    assert "environment" in str(caught.value)
