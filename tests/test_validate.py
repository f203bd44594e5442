"""What each value of a cell may be, and what is said of one that may not."""

import dataclasses
import os
import select
import shutil
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import validate as rules
from registry.compose import Composer
from registry.outcome import BadInput
from registry.redact import redact
from registry.schema import COMPILE_MODES, GROUPS, Config, GpuConfig
from registry.validate import validate, validate_profile

LARGEST = 9223372036854775807


@pytest.fixture
def config(composer: Composer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A cell in which everything is in order."""
    monkeypatch.chdir(tmp_path)
    return composer.cell(["model=tiny", "gpu=l4", "quant=nf4", "backend=hf", "context=100"])


def change(config: Config, key: str, value: Any) -> None:
    *path, name = key.split(".")
    node: Any = config
    for part in path:
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    if isinstance(node, dict):
        node[name] = value
    else:
        assert hasattr(node, name)
        setattr(node, name, value)


def refusal(config: Config) -> str:
    with pytest.raises(BadInput) as caught:
        validate(config)
    return str(caught.value)


def test_every_profile_and_model_is_in_order(composer: Composer) -> None:
    for group in ("gpu", "model", "protocol", "quant", "execution", "tracking"):
        for option in composer.options(group):
            validate(composer.cell([f"{group}={option}"]))
    for profile in composer.profiles().values():
        validate_profile(profile)


LEAST = {
    "model": ["layers", "hidden", "q_heads", "kv_heads", "head_dim", "ffn", "vocab", "max_context"],
    "protocol": ["context", "batch_size", "measured_steps", "timeout_s"],
}
AT_LEAST_1 = [f"{group}.{name}" for group, names in LEAST.items() for name in names]


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("key", AT_LEAST_1)
def test_at_least_1(config: Config, key: str, value: int) -> None:
    change(config, key, value)
    assert f"{key}={value}: at least 1" in refusal(config)


POSITIVE = ["gpu.peak_bandwidth_gbs", "gpu.memory_gb", "gpu.price_usd_per_hour"]


@pytest.mark.parametrize("key", POSITIVE)
def test_more_than_0_or_not_known(config: Config, key: str) -> None:
    for value in (0.0, -1.5):
        change(config, key, value)
        assert refusal(config) == f"{key}={value}: more than 0, or null where it is not known"
    for allowed in (None, 1e-9):
        change(config, key, allowed)
        validate(config)


BAD = [
    ("protocol.warmup_steps", -1, "protocol.warmup_steps=-1: at least 0"),
    ("protocol.seed", -1, "protocol.seed=-1: at least 0"),
    ("protocol.seed", LARGEST + 1, f"protocol.seed: a whole number of at most {LARGEST}"),
    ("protocol.timeout_s", 2000000.5, "protocol.timeout_s=2000000.5: at most 2000000, which is 23 days"),
    ("protocol.profiled_steps", -1, "protocol.profiled_steps=-1: at least 0"),
    ("protocol.profiled_steps", 1001, "protocol.profiled_steps=1001: at most 1000"),
    ("protocol.threads", 0, "protocol.threads=0: 1 to 1024, or null for one a physical core"),
    ("protocol.threads", 1025, "protocol.threads=1025: 1 to 1024, or null for one a physical core"),
    ("protocol.threads", 99999999, "protocol.threads=99999999: 1 to 1024, or null for one a physical core"),
    (
        "protocol.context",
        4062,
        "protocol.context=4062 with 5 + 30 steps ends at 4097 tokens, tiny takes 4096: at most context=4061",
    ),
    ("model.kv_heads", 3, "model.kv_heads=3 does not divide model.q_heads=4"),
    ("model.head_dim", 33, "model.head_dim=33: a rotary embedding turns pairs, so it is even"),
    ("model.rope_theta", 0.0, "model.rope_theta=0.0: more than 0"),
    ("model.rms_norm_eps", -1e-6, "model.rms_norm_eps=-1e-06: more than 0"),
    ("model.model_type", "lama", "model.model_type=lama: did you mean llama? Known: llama, mistral, qwen2"),
    ("model.qkv_bias", False, "model.qkv_bias=False: a qwen2 has biases on q, k and v"),
    ("execution.launch", "eagr", "execution.launch=eagr: did you mean eager?"),
    (
        "execution.mode",
        "reduce-overhead",
        "execution.mode=reduce-overhead: a mode is torch.compile's, and execution=eager has none",
    ),
    ("execution.cache", "statik", "execution.cache=statik: did you mean static?"),
    ("quant.weight_bits", 0.0, "quant.weight_bits=0.0: more than 0 and at most 32"),
    ("quant.weight_bits", 32.5, "quant.weight_bits=32.5: more than 0 and at most 32"),
    ("quant.study_bits", -4.0, "quant.study_bits=-4.0: more than 0 and at most 32"),
    ("records", "", "records is empty: name a folder"),
    ("tracking.experiment", "", "tracking.experiment is empty: name one"),
    ("tracking.experiment", " \t", "tracking.experiment is empty: name one"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD)
def test_a_value_out_of_range_is_refused_in_words(config: Config, key: str, value: Any, message: str) -> None:
    change(config, key, value)
    told = refusal(config)
    assert told.startswith(message)
    assert "; " not in told, "one mistake is told once"


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        (
            "reduce_overhead",
            "did you mean reduce-overhead? Known: default, max-autotune, max-autotune-no-cudagraphs, ",
        ),
        ("lite", "Known: default, max-autotune, max-autotune-no-cudagraphs, reduce-overhead"),
        (None, "Known: default, max-autotune"),
    ],
)
def test_a_mode_that_torch_compile_does_not_have_is_refused(composer: Composer, mode: str | None, told: str) -> None:
    compiled = composer.cell(["execution=compile"])
    validate(compiled)
    compiled.execution.mode = mode
    assert refusal(compiled).startswith(f"execution.mode={mode}: {told}")


def test_every_mode_is_torch_s_own() -> None:
    """A mode that torch no longer had, or one whose CUDA graphs it gave up, would be promised and not given."""
    from torch._inductor import list_mode_options

    for mode, graphs in COMPILE_MODES.items():
        assert list_mode_options(mode).get("triton.cudagraphs", False) is graphs


GOOD = [
    ("protocol.warmup_steps", 0),
    ("protocol.seed", 0),
    ("protocol.seed", LARGEST),
    ("protocol.profiled_steps", 1000),
    ("protocol.threads", None),
    ("protocol.threads", 1),
    ("protocol.threads", 1024),
    ("protocol.context", 4061),
    ("protocol.timeout_s", 2e6),
    ("quant.weight_bits", 0.5),
    ("quant.weight_bits", 32.0),
    ("records", "made/when/needed"),
    ("tracking.artifacts", None),
    ("tracking.artifacts", "s3://bucket/folder"),
]


@pytest.mark.parametrize(("key", "value"), GOOD)
def test_a_value_at_the_edge_is_taken(config: Config, key: str, value: Any) -> None:
    change(config, key, value)
    validate(config)


@pytest.mark.parametrize(
    ("model_type", "bias", "told"),
    [
        ("llama", True, "model.qkv_bias=True: a llama has no biases on q, k and v"),
        ("mistral", True, "model.qkv_bias=True: a mistral has no biases on q, k and v"),
        ("llama", False, ""),
        ("mistral", False, ""),
        ("qwen2", True, ""),
    ],
)
def test_a_family_s_biases(config: Config, model_type: str, bias: bool, told: str) -> None:
    config.model.model_type, config.model.qkv_bias = model_type, bias
    if told:
        assert refusal(config) == told
    else:
        validate(config)


def test_the_longest_timeout_is_one_that_poll_takes() -> None:
    read_end, write_end = os.pipe()
    poller = select.poll()
    poller.register(read_end, select.POLLIN)
    os.write(write_end, b"x")
    try:
        assert poller.poll(rules.LONGEST_S * 1000)
    finally:
        os.close(read_end)
        os.close(write_end)


def test_all_problems_are_told_at_once(config: Config) -> None:
    config.model.layers, config.quant.study_bits, config.tracking.experiment = 0, 99, ""
    config.gpu.price_usd_per_hour = 0
    assert refusal(config) == (
        "model.layers=0: at least 1; gpu.price_usd_per_hour=0: more than 0, or null where it is not known; "
        "quant.study_bits=99: more than 0 and at most 32; tracking.experiment is empty: name one"
    )


# Numbers that are none

FLOATS = [
    f"{group}.{f.name}"
    for group in GROUPS
    for f in dataclasses.fields(Config.__dataclass_fields__[group].default_factory)  # type: ignore[arg-type]
    if "float" in str(f.type)
]


def test_the_floats_are_found() -> None:
    assert {"model.rope_theta", "gpu.price_usd_per_hour", "quant.study_bits", "protocol.timeout_s"} <= set(FLOATS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("key", FLOATS)
def test_no_float_is_endless(config: Config, key: str, value: float) -> None:
    change(config, key, value)
    assert refusal(config) == f"{key}={value}: a finite number"


def test_no_option_of_a_plugin_is_endless(config: Config) -> None:
    config.quant.options = {"scale": {"of": [1.0, float("nan")]}}
    config.model.rope_scaling = {"factor": float("inf")}
    assert (
        refusal(config)
        == "model.rope_scaling.factor=inf: a finite number; quant.options.scale.of.1=nan: a finite number"
    )


INTEGERS = [f"model.{name}" for name in LEAST["model"]] + ["protocol.batch_size", "protocol.threads"]


@pytest.mark.parametrize("key", INTEGERS)
def test_no_whole_number_is_beyond_64_bits(config: Config, key: str) -> None:
    change(config, key, 10**5000)  # more digits than Python prints
    assert refusal(config) == f"{key}: a whole number of at most {LARGEST}"


# GPU profiles


@pytest.mark.parametrize(
    ("profile", "told"),
    [
        (GpuConfig("new"), "the GPU profile 'new' has no bandwidth: give gpu.peak_bandwidth_gbs="),
        (GpuConfig("new", peak_bandwidth_gbs=0.0), "gpu.peak_bandwidth_gbs=0.0: more than 0"),
        (GpuConfig("new", peak_bandwidth_gbs=-1.0), "gpu.peak_bandwidth_gbs=-1.0: more than 0"),
        (GpuConfig("new", peak_bandwidth_gbs=float("nan")), "gpu.peak_bandwidth_gbs=nan: a finite number"),
        (GpuConfig("new", measure_bandwidth=True, peak_bandwidth_gbs=-1.0), "gpu.peak_bandwidth_gbs=-1.0: more"),
        (GpuConfig("new", peak_bandwidth_gbs=1.0, price_usd_per_hour=0.0), "gpu.price_usd_per_hour=0.0: more"),
        (GpuConfig("new", peak_bandwidth_gbs=1.0, memory_gb=-2.0), "gpu.memory_gb=-2.0: more than 0"),
        (GpuConfig("new", measure_bandwidth=True), ""),
        (GpuConfig("new", peak_bandwidth_gbs=1.0), ""),
    ],
)
def test_a_profile_has_a_bandwidth_or_measures_it(profile: GpuConfig, told: str) -> None:
    if not told:
        validate_profile(profile)
        return
    with pytest.raises(BadInput) as caught:
        validate_profile(profile)
    assert str(caught.value).startswith(told)


# Folders


@pytest.mark.parametrize("key", ["records", "tracking.artifacts"])
def test_a_folder_is_one_or_can_be_made(config: Config, tmp_path: Path, key: str) -> None:
    (tmp_path / "file").touch()
    for value, told in (
        ("file", f"{key}=file: file is no folder"),
        ("file/below/it", f"{key}=file/below/it: file is no folder"),
        (str(tmp_path / "file"), f"{key}={tmp_path / 'file'}: {tmp_path / 'file'} is no folder"),
        ("x" * 300, f"{key}={'x' * 300}: [Errno 36] File name too long"),
    ):
        change(config, key, value)
        assert refusal(config).startswith(told)
    assert [file.name for file in tmp_path.iterdir()] == ["file"], "looking writes nothing"


@pytest.mark.parametrize("key", ["records", "tracking.artifacts"])
def test_a_folder_that_cannot_be_written_is_refused(config: Config, key: str) -> None:
    """Root may write anywhere, but nobody makes a file in /proc."""
    change(config, key, "/proc/new")
    assert refusal(config).startswith(f"{key}=/proc/new cannot be written: ")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722, 0o1777])
def test_a_cache_into_which_others_may_write_is_refused(config: Config, tmp_path: Path, mode: int) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    config.cache.folder = str(tmp_path / "cache")
    assert refusal(config).startswith(f"cache.folder={tmp_path / 'cache'}: others may write into it")
    (tmp_path / "cache").chmod(0o755)
    validate(config)


def test_another_user_s_cache_is_refused(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.cache.folder = str(tmp_path)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert refusal(config).startswith(f"cache.folder={tmp_path}: it belongs to another user ({user})")


# Where MLflow is

NO_URI = [
    ("", "did you mean sqlite:///mlflow.db?"),
    ("mlruns", "did you mean sqlite:///mlflow.db?"),
    ("./mlflow.db", "did you mean sqlite:///mlflow.db?"),
    ("file:///tmp/mlruns", "MLflow is reached by sqlite://, postgresql://, mysql://, mssql://, http://, https://"),
    ("databricks", "did you mean"),
    ("htp://host", "did you mean"),
    ("http://", "names no host"),
    ("http://:5000", "names no host"),
    ("https:///path", "names no host"),
    ("http://host:0", "no server listens on port 0"),
    ("http://host:99999", "is no address"),
    ("http://host:port", "is no address"),
    ("http://[host", "is no address"),
    ("http://host/#/experiments/1", "a server's address ends before its ? or #"),
    ("http://host?a=b", "a server's address ends before its ? or #"),
    ("postgresql://", "names no database"),
    ("postgresql:///", "names no database"),
    ("sqlite://", "names no file"),
    ("sqlite:///", "names no file"),
    ("sqlite:///:memory:", "names no file"),
    ("sqlite:///?timeout=5", "names no file"),
    ("sqlite:///folder", "names no file"),
    ("sqlite:///missing/mlflow.db", "there is no folder missing"),
    ("sqlite:///text.db", "text.db is no SQLite database"),
    ("sqlite:///text.db/mlflow.db", "there is no folder text.db"),
    (f"sqlite:///{'x' * 300}", "File name too long"),
    ("sqlite+burglar:///mlflow.db", "and no other driver"),
    ("postgresql+burglar://host/db", "and no other driver"),
    ("mysql://host/db", "did you mean mysql+pymysql"),
    ("mysql+burglar://host/db", "and no other driver"),
    ("mssql://host/db", "did you mean mssql+pyodbc"),
    ("sqlite:///mlflow.db?plugin=burglar", "plugin= is not passed on"),
    ("sqlite:///mlflow.db?timeout=5&%70lugin=burglar", "plugin= is not passed on"),
    ("postgresql://host/db?plugin=burglar", "plugin= is not passed on"),
    ("postgresql://me:a?b@host/db?plugin=burglar", "an @ stands behind its ?"),
    ("mysql+pymysql://host/db?read_default_file=/tmp/my.cnf", "read_default_file= is not passed on"),
    ("mssql+pyodbc://host/db?odbc_connect=DRIVER%3D/tmp/burglar.so", "odbc_connect= is not passed on"),
    ("mssql+pyodbc://host/db?Driver=%2Ftmp%2Fburglar.so", "Driver= is the name under which"),
    ("mssql+pyodbc://host/db?FileDSN=burglar.dsn", "FileDSN= is not passed on"),
    ("mssql+pyodbc://host/db?driver=x%7D;FileDSN=burglar.dsn", "driver= is the name under which"),
    ("sqlite:///?mode=memory", "mode= is not passed on"),
    ("sqlite:///mlflow.db?uri=true", "uri= is not passed on to a database's driver; taken are timeout"),
    ("postgresql+psycopg2://host/db?sslmode=require&sslkey=/bin/sh:k", "sslkey= names no file"),
    ("postgresql+psycopg2://host/db?SSLKEY=%2Fbin%2Fsh%3Ak", "SSLKEY= names no file"),
    ("postgresql+psycopg2://host/db?sslkey=/bin/sh;y:k", "y:k= is not passed on"),
    ("postgresql+psycopg2://host/db?sslkey=/bin/sh?y:k", "y:k= is not passed on"),
    ("postgresql+psycopg2://host/db?sslkey=burglar", "sslkey= names no file"),
    ("postgresql+psycopg2://host/db?sslcert=/bin/no-such-file", "sslcert= names no file"),
    ("postgresql+psycopg2://host/db?sslrootcert=folder", "sslrootcert= names no file"),
    ("postgresql://host/db?options=-csession_preload_libraries%3Dburglar", "options= is not passed on"),
    ("postgresql://host/db?service=burglar", "service= is not passed on"),
    ("postgresql://host/db?gsslib=gssapi", "gsslib= is not passed on"),
    ("postgresql://host/db?sslkey=/bin/sh:k&application_name=@", "an @ stands behind its ?"),
    ("mysql+pymysql://host/db?ssl_key=burglar", "ssl_key= names no file"),
    ("mysql+pymysql://host/db?local_infile=1", "local_infile= is not passed on"),
    ("sqlite:///mlflow.db?timeout=foo", "timeout= is a number of seconds"),
    ("sqlite:///mlflow.db?timeout=-1", "timeout= is a number of seconds"),
    ("sqlite:///mlflow.db?timeout=nan", "timeout= is a number of seconds"),
    ("sqlite:///mlflow.db?timeout=5&timeout=6", "timeout= stands there twice"),
    ("postgresql://h/d?connect_timeout=abc", "connect_timeout= is a whole number of 0 to 2147483647"),
    ("postgresql://h/d?port=x", "port= is a whole number of 1 to 65535"),
    ("postgresql://h/d?host=a,b&port=5432,0", "port= is a whole number of 1 to 65535"),
    ("postgresql://h/d?sslmode=banana", "sslmode= has no such value: "),
    ("postgresql://h/d?sslmode=requir", "did you mean require or prefer?"),
    ("postgresql://h/d?sslmode=REQUIRE", "sslmode= has no such value: "),
    ("postgresql://h/d?keepalives=2", "keepalives= is a whole number of 0 to 1"),
    ("postgresql://h/d?hostaddr=localhost", "hostaddr= is an IP address"),
    ("postgresql://h/d?require_auth=md5,maybe", "require_auth= has no such value: "),
    ("postgresql://h/d?target_session_attrs=", "target_session_attrs= has no such value: "),
    ("postgresql://h/d?application_name=", "application_name= is empty"),
    ("mysql+pymysql://h/d?connect_timeout=0", "connect_timeout= is a whole number of 1 to 31536000"),
    ("mysql+pymysql://h/d?use_unicode=perhaps", "use_unicode= has no such value: "),
    ("mssql+pyodbc://h/d?driver=x&Encrypt=maybe", "Encrypt= has no such value: "),
]


@pytest.mark.parametrize(("uri", "told"), NO_URI)
def test_where_mlflow_cannot_be_is_refused(config: Config, tmp_path: Path, uri: str, told: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.db").write_text("no database at all")
    config.tracking.uri = uri
    found = refusal(config)
    assert found.startswith(f"tracking.uri={redact(uri)}")
    assert told in found.removeprefix(f"tracking.uri={redact(uri)}")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "text.db"], "looking writes nothing"


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///mlflow.db",
        "sqlite:///new.db?timeout=60",
        "sqlite+pysqlite:///mlflow.db",
        "sqlite:///empty.db",
        "http://127.0.0.1:5000",
        "https://user:word@host.example/mlflow",
        "http://[::1]:5000",
        "postgresql://user:word@host:5432/mlflow",
        "postgresql+psycopg2:///mlflow",
        "postgresql+psycopg://host/mlflow?sslmode=require",
        "postgresql://me:w;rd@/mlflow?host=/run/postgresql&connect_timeout=5&target_session_attrs=read-write",
        "postgresql://host/mlflow?sslmode=verify-full&sslrootcert=/etc/passwd&sslkey=%2Fetc%2Fpasswd&user=me%40there",
        "mysql+pymysql://host/mlflow?charset=utf8mb4",
        "mysql+pymysql://host/mlflow?ssl_ca=/etc/passwd",
        "mssql+pyodbc://host/mlflow?driver=ODBC+Driver+18+for+SQL+Server",
        "sqlite:///new.db?timeout=0.5",
        "postgresql:///mlflow?host=one:5432&host=two:5433",
        "postgresql:///mlflow?host=one,two&port=5432,&hostaddr=10.0.0.1,::1&require_auth=!md5,!none",
        "postgresql://host/mlflow?port=5432&keepalives=1&keepalives_idle=30&ssl_min_protocol_version=tlsv1.2",
        "mysql+pymysql://host/mlflow?connect_timeout=10&use_unicode=1&ssl_verify_cert=true",
        "mssql+pyodbc://host/mlflow?driver=FreeTDS&Encrypt=Strict&ApplicationIntent=readonly&timeout=5",
    ],
)
def test_where_mlflow_can_be_is_taken(config: Config, tmp_path: Path, uri: str) -> None:
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("create table runs (id)")
    database.close()
    (tmp_path / "empty.db").touch()
    config.tracking.uri = uri
    validate(config)
    assert not (tmp_path / "new.db").exists()


@pytest.mark.parametrize("store", ["burglar", "oss", "hdfs", "runs", "s3+burglar", ""])
def test_a_store_that_mlflow_itself_does_not_know_is_refused(config: Config, store: str) -> None:
    """Installed plugins of MLflow know others, and hdfs loads a native library."""
    config.tracking.artifacts = f"{store}://bucket/x"
    told = refusal(config)
    assert told.startswith(f"tracking.artifacts={store}://bucket/x: ")
    assert "s3, sftp" in told


@pytest.mark.parametrize("store", ["file", "s3", "gs", "wasbs", "abfss", "sftp", "https", "mlflow-artifacts"])
def test_a_store_that_mlflow_knows_is_taken(config: Config, store: str) -> None:
    from mlflow.store.artifact.artifact_repository_registry import get_registered_artifact_repositories

    config.tracking.artifacts = f"{store}://bucket/x"
    validate(config)
    assert store in rules.STORES
    assert {*rules.STORES} <= {*get_registered_artifact_repositories()}


def test_a_database_in_a_folder_that_cannot_be_written_is_refused(config: Config) -> None:
    """Even if the file can be: SQLite's journal lies beside it. Nobody, root neither, makes a file in /proc."""
    config.tracking.uri = "sqlite:////proc/self/oom_score_adj"
    assert refusal(config).startswith("tracking.uri=sqlite:////proc/self/oom_score_adj cannot be written: ")


def test_a_database_that_cannot_be_written_is_refused(config: Config, tmp_path: Path) -> None:
    """A program that runs is written by nobody, root neither."""
    running = shutil.copy("/bin/sleep", tmp_path / "mlflow.db")
    with subprocess.Popen([running, "60"]) as process:
        config.tracking.uri = "sqlite:///mlflow.db"
        assert refusal(config) == "tracking.uri=sqlite:///mlflow.db cannot be written: Text file busy"
        process.kill()


@pytest.mark.parametrize(
    "uri",
    [
        "htp://user:{}@host/db",
        "http://user:{}@:5000",
        "http://user:{}@host:99999",
        "http://user:{}@host/?a=b",
        "http://{}@/",
        "http://host?token={}",
        "http://user:{}/more@host",  # the slash belongs into the password, and urlsplit takes it for a path
        "postgresql://user:{}@:99999/db",
        "postgresql://user:p@{}@host:99999/db",
        "oracle://host/db?user=me&password={}&x=y",
        "sqlite://user:{}@host/mlflow.db",
    ],
)
def test_no_password_is_repeated_in_a_refusal(config: Config, uri: str) -> None:
    config.tracking.uri = uri.format("hunter2")
    told = refusal(config)
    assert told.startswith("tracking.uri=")
    assert "hunter2" not in told


def test_the_constants_are_those_of_the_configuration(composer: Composer) -> None:
    cells = [composer.cell([f"execution={name}"]).execution for name in composer.options("execution")]
    assert {execution.launch for execution in cells} == set(rules.EXECUTIONS)
    assert {execution.name for execution in cells} == set(composer.options("execution"))
    assert {execution.mode for execution in cells} <= {None, *COMPILE_MODES}
    types = {composer.cell([f"model={name}"]).model.model_type for name in composer.options("model")}
    assert types <= set(rules.MODEL_TYPES) == set(rules.BIASES)


PIECES = st.sampled_from(
    ["http", "sqlite", "postgresql", "://", ":///", "@", "/", "#", "?", "[", ":", "a", "\0", "é"]
)


@given(pieces=st.lists(PIECES, max_size=8))
def test_any_uri_is_taken_or_refused(composer: Composer, pieces: list[str]) -> None:
    config = composer.cell([])
    config.tracking.uri = "".join(pieces)
    told = f"tracking.uri={redact(config.tracking.uri)}"
    try:
        validate(config)
    except BadInput as error:
        told = str(error)
    assert told.startswith("tracking.uri=")
