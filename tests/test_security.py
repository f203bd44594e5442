"""What a call, a YAML file, a model folder or a plugin tries that is none of its business."""

import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf

from registry import sweep
from registry.compose import CONF, Composer
from registry.outcome import BadInput
from registry.plugins import Catalog
from registry.validate import validate

ROOT = CONF.parent

Call = Callable[..., subprocess.CompletedProcess[str]]
Write = Callable[[str, str], Path]


def compose(composer: Composer, *overrides: str) -> None:
    """Compose every cell of a call, as far as its values are looked at."""
    for job in composer.jobs(overrides, multirun=True):
        validate(composer.cell(job))


# Hydra's doors: the command line


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder on PYTHONPATH: a module that leaves a mark where it is imported or called, a distribution's YAML."""
    site = tmp_path / "site"
    (site / "brought" / "conf").mkdir(parents=True)
    (site / "brought" / "__init__.py").touch()
    info = site / "brought-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[rfloor.conf]\nbrought = brought.conf\n")
    (site / "burglar.py").write_text(
        "import logging, pathlib\n"
        f"def enter(*_, **__):\n    pathlib.Path({str(tmp_path / 'entered')!r}).touch()\n"
        "    return logging.NullHandler()\n"
        "enter()\n"
    )
    return site


@pytest.fixture
def call(site: Path, tmp_path: Path) -> Call:
    """Call runner.py in an empty folder; nothing may have been entered, nor anything written."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, str(ROOT / "runner.py"), *arguments],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""} | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert not (tmp_path / "entered").exists(), f"{arguments} called what a configuration named"
        assert list(cwd.iterdir()) == []
        return done

    return call


def told(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that bad input is answered with."""
    assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("rfloor: ")
    return line


FLAGS = ("--experimental-rerun", "--config-dir", "--config-path", "--config-name", "--experimental-r")
ASKED = ([], ["--help"], ["--hydra-help"], ["--cfg", "job"], ["--info"], ["-sc"], ["-m"])


@pytest.mark.parametrize("asked", ASKED, ids=" ".join)
@pytest.mark.parametrize("flag", FLAGS)
def test_no_flag_brings_a_configuration(capsys: pytest.CaptureFixture[str], asked: list[str], flag: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        sweep.prepare([f"{flag}=/tmp/brought", *asked])
    assert "rfloor's configuration lies in conf/ and in its plugins" in capsys.readouterr().err


def test_no_call_unpickles(call: Call, tmp_path: Path) -> None:
    """As Hydra does what it is told to rerun, whatever else it is asked for."""
    brought = tmp_path / "brought.pickle"
    brought.write_bytes(pickle.dumps(Burglar(tmp_path / "entered")))
    told(call("--help", f"--experimental-rerun={brought}"))


class Burglar:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+hydra.launcher.foo=1", "hydra.launcher.foo"),
        ("++hydra.launcher.foo=1", "hydra.launcher.foo"),
        ("+hydra.launcher.x={_target_:burglar.enter}", "_target_"),
        ("+hydra.launcher._args_=[1]", "hydra.launcher._args_"),
        ("hydra.launcher={}", "hydra.launcher"),
        ("hydra.verbose={a:1}", "hydra.verbose"),
        ("hydra.verbose=[1]", "hydra.verbose"),
        ("hydra.verbose=3", "hydra.verbose"),
        ("hydra.verbose=null", "hydra.verbose"),
        ("hydra.callbacks.x._target_=burglar.enter", "_target_"),
        ("+hydra.callbacks.x='${oc.env:HOME}'", "hydra.callbacks"),
        ("hydra.job_logging.handlers={x:{class:burglar.enter}}", "hydra.job_logging"),
        ("hydra/job_logging=default", "hydra/job_logging"),
        ("hydra/callbacks=x", "hydra/callbacks"),
        ("hydra/hydra_logging=default", "hydra/hydra_logging"),
        ("hydra/sweeper=basic", "hydra/sweeper"),
        ("hydra/help=default", "hydra/help"),
        ("hydra.sweeper.max_batch_size=1", "hydra.sweeper"),
        ("+hydra.sweeper.params.x=1", "hydra.sweeper"),
        ("hydra.searchpath=[file:///tmp]", "hydra.searchpath"),
        ("hydra.searchpath=[pkg://burglar]", "hydra.searchpath"),
        ("hydra.run.dir=${oc.env:HOME}", "hydra.run.dir"),
        ("hydra.sweep.dir=elsewhere", "hydra.sweep.dir"),
        ("hydra.sweep.subdir=elsewhere", "hydra.sweep.subdir"),
        ("hydra.output_subdir=.hydra", "hydra.output_subdir"),
        ("hydra.job.env_set={LD_PRELOAD:x}", "hydra.job.env_set"),
        ("+hydra.job.env_set.LD_PRELOAD=x", "hydra.job.env_set"),
        ("hydra.job.env_copy=[HOME]", "hydra.job.env_copy"),
        ("hydra.job.chdir=true", "hydra.job.chdir"),
        ("hydra.job.config.override_dirname.kv_sep=x", "hydra.job"),
        ("hydra.mode=RUN", "hydra.mode"),
        ("hydra.help.template=x", "hydra.help"),
        ("hydra={callbacks:{}}", "no key is called 'hydra'"),
        ("+hydra={callbacks:{}}", "+ adds a plugin's option"),
        ("model@hydra.callbacks=tiny", "a group keeps its place"),
        ("+hydra/callbacks@_global_=x", "a group keeps its place"),
    ],
)
def test_hydra_s_own_keys_are_closed(composer: Composer, override: str, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        composer.jobs([override, "model=tiny"], multirun=True)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "+quant.options.x={a:{_target_:burglar.enter}}",
        "+quant.options.x=[{_target_:burglar.enter}]",
        "quant.options._target_=burglar.enter",
        "+model.rope_scaling._target_=burglar.enter",
        "gpu.sources={_target_:burglar.enter}",
        "experiment.cells=[{_target_:burglar.enter}]",
        # put together where nobody reads it
        "+quant.options.x='${oc.decode:\"{_tar${oc.env:PART}_: burglar.enter}\"}'",
        "gpu.sources='${oc.decode:\"{_tar${oc.env:PART}_: burglar.enter}\"}'",
        "gpu.sources=${oc.create:${oc.dict.values:gpu.sources}}",
    ],
)
def test_no_cell_names_code_to_call(composer: Composer, monkeypatch: pytest.MonkeyPatch, override: str) -> None:
    monkeypatch.setenv("PART", "get")
    with pytest.raises(BadInput):
        compose(composer, override, "model=llama-3.1-8b", "quant=nf4")


# Hydra's doors: YAML that a plugin or a colleague brings


@pytest.fixture
def write(site: Path) -> Write:
    """Write a YAML file into the folder that a distribution adds to the search path."""

    def write(name: str, text: str) -> Path:
        file = site / "brought" / "conf" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
        return file

    return write


@pytest.fixture
def stranger(site: Path, composer: Composer, monkeypatch: pytest.MonkeyPatch) -> Composer:
    """A composer that sees that folder; `composer` has filled Hydra's store before."""
    monkeypatch.setattr(Catalog, "conf_folders", lambda _: [site / "brought" / "conf"])
    return Composer(Catalog())


CALLS = "{(): burglar.enter}"
OPTIONS = {
    "logging": f"hydra: {{job_logging: {{handlers: {{x: {CALLS}}}, root: {{handlers: [x]}}}}}}",
    "hydra logging": f"hydra: {{hydra_logging: {{handlers: {{x: {CALLS}}}, root: {{handlers: [x]}}}}}}",
    "callbacks": "hydra: {callbacks: {x: {_target_: burglar.enter}}}",
    "launcher": "hydra: {launcher: {_target_: burglar.enter}}",
    "launcher's key": "hydra: {launcher: {x: {_target_: burglar.enter}}}",
    "sweeper": "hydra: {sweeper: {_target_: burglar.enter}}",
    "environment": "hydra: {job: {env_set: {LD_PRELOAD: burglar.so}}}",
    "verbose": "hydra: {verbose: true}",
    "search path": "hydra: {searchpath: ['file:///tmp']}",
}
OVERRULED = {
    "callback": "hydra: {callbacks: {sweep: null}}",
    "copies": "hydra: {output_subdir: .hydra}",
    "folder": "hydra: {sweep: {dir: elsewhere}}",
    "run folder": "hydra: {run: {dir: '${oc.env:HOME}'}}",
    "mode": "hydra: {mode: RUN}",
    "help": "hydra: {help: {template: burglar}}",
}
"""What conf/config.yaml, which has the last word, sets itself."""


@pytest.mark.parametrize("door", OPTIONS)
def test_an_option_s_file_changes_nothing_of_hydra_s(stranger: Composer, write: Write, door: str) -> None:
    """`# @package _global_` lets a file of a group speak of everything, and Hydra obeys at the job's start."""
    write("quant/odd.yaml", f"# @package _global_\n{OPTIONS[door]}\nquant: {{name: none}}\n")
    with pytest.raises(BadInput, match=r"quant.odd.*(hydra|Launcher)") as caught:
        stranger.cell(["model=tiny", "quant=odd"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("door", OVERRULED)
def test_what_rfloor_says_of_hydra_no_option_s_file_changes(stranger: Composer, write: Write, door: str) -> None:
    write("quant/odd.yaml", f"# @package _global_\n{OVERRULED[door]}\nquant: {{name: none}}\n")
    stranger.cell(["model=tiny", "quant=odd"])
    own, found = (
        OmegaConf.to_container(stranger._load(choice, RunMode.MULTIRUN).hydra) for choice in ([], ["quant=odd"])
    )
    for part in ("callbacks", "output_subdir", "sweep", "run", "mode", "help"):
        assert found[part] == own[part]


DEFAULTS = {
    "group": "defaults: [{/hydra/job_logging@_global_.hydra.job_logging: burglar}]",
    "override": "defaults: [{override /hydra/job_logging: burglar}]",
    "callback": "defaults: [/hydra/callbacks/burglar]",
    "placed": "defaults: [/hydra/callbacks/burglar@_global_.hydra.callbacks]",
    "launcher": "defaults: [{override /hydra/launcher: burglar}]",
}


@pytest.mark.parametrize("door", DEFAULTS)
def test_an_option_s_defaults_bring_nothing_of_hydra_s(stranger: Composer, write: Write, door: str) -> None:
    write("hydra/job_logging/burglar.yaml", f"version: 1\nhandlers: {{x: {CALLS}}}\nroot: {{handlers: [x]}}\n")
    write("hydra/callbacks/burglar.yaml", "x: {_target_: burglar.enter}\n")
    write("hydra/launcher/burglar.yaml", "_target_: burglar.enter\n")
    write("quant/odd.yaml", f"{DEFAULTS[door]}\nname: none\n")
    with pytest.raises(BadInput):
        stranger.cell(["model=tiny", "quant=odd"])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("quant/odd.yaml", "name: none\n_target_: burglar.enter\n"),
        ("quant/odd.yaml", "name: none\noptions: {_target_: burglar.enter}\n"),
        ("quant/odd.yaml", "name: none\noptions: {x: [{y: {_target_: burglar.enter}}]}\n"),
        ("gpu/odd.yaml", "name: odd\nmeasure_bandwidth: true\nsources: {_target_: burglar.enter}\n"),
        ("experiment/odd.yaml", "name: odd\ncells: [{model: tiny, _target_: burglar.enter}]\n"),
        (
            "experiment/odd.yaml",
            "name: odd\ncells: [{model: tiny}]\n"
            "study: [{metric: a, value: 1, gpu: l4, source: x, where: {_target_: burglar.enter}}]\n",
        ),
        ("tracking/odd.yaml", "name: odd\nuri: sqlite:///x.db\nexperiment: x\n_target_: burglar.enter\n"),
    ],
    ids=range(7),
)
def test_a_group_s_file_names_no_code_to_call(stranger: Composer, write: Write, file: str, text: str) -> None:
    write(file, text)
    with pytest.raises(BadInput, match="_target_") as caught:
        compose(stranger, f"{file.partition('/')[0]}=odd")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["hydra.launcher.x", "hydra/launcher", "hydra.verbose", "hydra.callbacks", "~model"])
def test_an_experiment_s_cells_are_cells_alone(stranger: Composer, write: Write, key: str) -> None:
    write("experiment/odd.yaml", f"name: odd\ncells: [{{model: tiny, {key}: basic}}]\n")
    with pytest.raises(BadInput) as caught:
        stranger.jobs(["experiment=odd"], multirun=True)
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"name: !!python/object/apply:burglar.enter []\n", "python/object/apply"),
        (b"name: [unclosed\n", "flow sequence"),
        (b"\xff\xfe\x00", "utf-8"),
        (b"name: none\n\x00", "special characters"),
        (b"- a list\n", ""),
        (b"just text\n", ""),
        (b"defaults: 5\n", ""),
        (b"defaults: [5]\n", ""),
        (b"{a: [" * 2000, ""),
        (b"name: none\nname: none\n", "duplicate"),
        (b"? [1, 2]\n: 3\n", ""),
        (b"? !!python/name:os.system\n: 3\n", ""),
        (b"# @package \x01\nname: none\n", ""),
        (b"# @package a b c\nname: none\n", ""),
    ],
    ids=range(14),
)
def test_a_damaged_file_of_an_option_is_bad_input_with_its_name(
    stranger: Composer, write: Write, text: bytes, words: str
) -> None:
    write("quant/odd.yaml", "").write_bytes(text)
    with pytest.raises(BadInput) as caught:
        stranger.cell(["model=tiny", "quant=odd"])
    assert "quant=odd" in str(caught.value) or "odd.yaml" in str(caught.value) or "quant/odd" in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_that_a_file_names_is_entered_in_a_whole_call(call: Call, write: Write) -> None:
    write("quant/odd.yaml", f"# @package _global_\n{OPTIONS['logging']}\nquant: {{name: none}}\n")
    line = told(call("model=tiny", "gpu=cpu", "execution=cuda_graph", "quant=odd"))
    assert "quant=odd" in line


def test_a_launcher_that_is_no_plugin_of_hydra_s_is_refused_beforehand(call: Call, write: Write) -> None:
    write("hydra/launcher/odd.yaml", "_target_: burglar.enter\n")
    assert "hydra/launcher=odd" in told(call("model=tiny", "gpu=cpu", "hydra/launcher=odd"))
    write("hydra/launcher/odd.yaml", "_target_: hydra._internal.core_plugins.basic_sweeper.BasicSweeper\n")
    assert "hydra/launcher=odd" in told(call("model=tiny", "gpu=cpu", "hydra/launcher=odd"))


@pytest.mark.parametrize("arguments", [["-sc"], ["-sc", "foo=bar"], ["-sc", "install=tcsh"], ["-sc", "query=bash"]])
def test_a_shell_that_cannot_be_completed_for_is_told(call: Call, arguments: list[str]) -> None:
    assert "shell" in told(call(*arguments))
