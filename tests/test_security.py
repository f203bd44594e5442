"""What a call, a YAML file, a model folder or a plugin tries that is none of its business."""

import ast
import json
import os
import pickle
import re
import shutil
import site as sites
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.types import RunMode
from omegaconf import OmegaConf
from planning import CPU, Plan
from sweeps import Start, told
from test_record import made_up_cell, made_up_record
from test_weights import small as small
from transformers import AutoModelForCausalLM

from registry import cli, environments, hardware, importing, logs, private, run, sweep
from registry import record as records
from registry.architecture import Architecture
from registry.archive import everything_in
from registry.call import Call
from registry.checkpoint import INDEX, expected_tensors
from registry.compose import CONF, Composer
from registry.outcome import BadInput, Outcome
from registry.plugins import Catalog
from registry.report.build import build
from registry.report.observation import Observation
from registry.report.page import html
from registry.schema import TrackingConfig
from registry.validate import validate
from registry.weights import FolderWeights, check_weights, open_weights

ROOT = CONF.parent

Runner = Callable[..., subprocess.CompletedProcess[str]]
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
def call(site: Path, tmp_path: Path) -> Runner:
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


FLAGS = ("--experimental-rerun", "--config-dir", "--config-path", "--config-name", "--experimental-r")
ASKED = ([], ["--help"], ["--hydra-help"], ["--cfg", "job"], ["--info"], ["-sc"], ["-m"])


@pytest.mark.parametrize("asked", ASKED, ids=" ".join)
@pytest.mark.parametrize("flag", FLAGS)
def test_no_flag_brings_a_configuration(capsys: pytest.CaptureFixture[str], asked: list[str], flag: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        sweep.prepare([f"{flag}=/tmp/brought", *asked])
    assert "rfloor's configuration lies in conf/ and in its plugins" in capsys.readouterr().err


def test_no_call_unpickles(call: Runner, tmp_path: Path) -> None:
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


def test_nothing_that_a_file_names_is_entered_in_a_whole_call(call: Runner, write: Write) -> None:
    write("quant/odd.yaml", f"# @package _global_\n{OPTIONS['logging']}\nquant: {{name: none}}\n")
    line = told(call("model=tiny", "gpu=cpu", "execution=cuda_graph", "quant=odd"))
    assert "quant=odd" in line


def test_a_launcher_that_is_no_plugin_of_hydra_s_is_refused_beforehand(call: Runner, write: Write) -> None:
    write("hydra/launcher/odd.yaml", "_target_: burglar.enter\n")
    assert "hydra/launcher=odd" in told(call("model=tiny", "gpu=cpu", "hydra/launcher=odd"))
    write("hydra/launcher/odd.yaml", "_target_: hydra._internal.core_plugins.basic_sweeper.BasicSweeper\n")
    assert "hydra/launcher=odd" in told(call("model=tiny", "gpu=cpu", "hydra/launcher=odd"))


FARM = """
import pathlib
from dataclasses import dataclass, field
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher

class Farm(BasicLauncher):
    def __init__(self, name, n_jobs, setup, python, queue, submitit_folder):
        assert (n_jobs, setup, python, queue) == (2, None, "python", {"a": 1})

@dataclass
class Config:
    _target_: str = "hydra_plugins.farm.Farm"
    name: str = "${hydra.job.name}"
    n_jobs: int = 1
    setup: list[str] | None = None
    python: str = "python"
    queue: dict[str, int] = field(default_factory=lambda: {"a": 1})
    submitit_folder: str = "${hydra.sweep.dir}/x"

ConfigStore.instance().store(group="hydra/launcher", name="farm", node=Config, provider="farm")
"""


@pytest.fixture
def farm(site: Path) -> None:
    """A launcher that hands cells to a shell, as submitit's does."""
    (site / "hydra_plugins").mkdir()
    (site / "hydra_plugins" / "farm.py").write_text(FARM)


def test_a_launcher_is_told_how_many_and_where(call: Runner, farm: None) -> None:
    done = call("-m", "model=tiny", "gpu=cpu", "dry_run=true", "hydra/launcher=farm", "hydra.launcher.n_jobs=2")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "override",
    [
        *("hydra.launcher.setup=[touch entered]", "hydra.launcher.python=/tmp/x", "hydra.launcher.queue.a=2"),
        *("hydra.launcher.submitit_folder=/tmp", "hydra.launcher.name='a\nb'", "+hydra.launcher.queue.b=2"),
    ],
)
def test_a_launcher_is_told_nothing_that_a_shell_runs(call: Runner, farm: None, override: str) -> None:
    assert "hydra.launcher" in told(call("-m", "model=tiny", "gpu=cpu", "hydra/launcher=farm", override))


@pytest.mark.parametrize("line", ["setup: [touch entered]", "python: /tmp/x", "queue: {a: 2}"])
def test_a_file_tells_a_launcher_nothing_of_its_own(call: Runner, write: Write, farm: None, line: str) -> None:
    write("hydra/launcher/odd.yaml", f"defaults: [farm]\n{line}\n")
    message = told(call("-m", "model=tiny", "gpu=cpu", "hydra/launcher=odd", "hydra.launcher.n_jobs=2"))
    assert f"hydra.launcher.{line.partition(':')[0]}" in message


@pytest.mark.parametrize("way", ["{}", "../{}"], ids=["absolute", "upwards"])
@pytest.mark.parametrize("key", ["backend.options.environment", "+backend.options.environment"])
def test_no_call_says_which_interpreter_runs_a_cell(call: Runner, tmp_path: Path, key: str, way: str) -> None:
    python = tmp_path / "brought" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\ntouch {tmp_path / 'entered'}\n")
    python.chmod(0o755)
    for package in ("autoawq-0.2.9", "torch-2.11.0", "transformers-4.51.3"):
        info = tmp_path / "brought" / "lib" / "python3.12" / "site-packages" / f"{package}.dist-info"
        info.mkdir(parents=True)
        name, _, version = package.rpartition("-")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    folder = tmp_path / "brought" if way == "{}" else os.path.relpath(tmp_path / "brought", ROOT.parent)
    line = told(call("model=tiny", "gpu=cpu", "quant=autoawq", "backend=autoawq", f"{key}={way.format(folder)}"))
    assert "environment" in line


@pytest.mark.parametrize("arguments", [["-sc"], ["-sc", "foo=bar"], ["-sc", "install=tcsh"], ["-sc", "query=bash"]])
def test_a_shell_that_cannot_be_completed_for_is_told(call: Runner, arguments: list[str]) -> None:
    assert "shell" in told(call(*arguments))


# The cache, out of which kernels are loaded


def test_the_cache_is_made_for_its_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        private.made(tmp_path / "new" / "cache")
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("new", "new/cache")} == {0o700}


def test_a_cache_that_becomes_another_s_is_not_loaded_from(plan: Plan, tmp_path: Path) -> None:
    """It was not there when the call was looked at, and somebody was faster."""
    cell = plan(
        "model=tiny", "context=64", f"records={tmp_path / 'records'}", f"cache.folder={tmp_path / 'c'}", device=CPU
    )
    (tmp_path / "c").mkdir()
    (tmp_path / "c").chmod(0o777)
    record = run.run_cell(cell, 0, 0, Call("sweep", None, lambda _: None))
    assert record.outcome is Outcome.CRASH
    assert "no worker could be started" in record.reason
    assert "others may write into it" in record.reason


# Model folders


@pytest.fixture(scope="module")
def saved(small: Architecture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good folder in two shards; never changed."""
    folder = tmp_path_factory.mktemp("saved")
    AutoModelForCausalLM.from_config(small.transformers_config()).save_pretrained(folder, max_shard_size="200KB")
    assert len([*folder.glob("*.safetensors")]) == 2
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def refusal(folder: Path, architecture: Architecture) -> str:
    """What is said of it, at once."""
    start = time.monotonic()
    with pytest.raises(BadInput) as caught:
        check_weights(str(folder), architecture)
    assert time.monotonic() - start < 5
    return str(caught.value)


@pytest.mark.parametrize(
    "shard",
    [
        *("../x.safetensors", "/etc/hostname", "sub/x.safetensors", "a/../../x.safetensors", "..", ".", "", "/"),
        *("./x.safetensors", "x.safetensors/", "~/x.safetensors", "x\0.safetensors", "x" * 300, "\udcff.safetensors"),
        *(None, 5, ["x.safetensors"], {"x": 1}, True),
    ],
)
def test_an_index_names_files_of_its_own_folder(folder: Path, small: Architecture, shard: object) -> None:
    for name in ("x.safetensors", "sub/x.safetensors", "../x.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(next(folder.glob("model-00001*")), folder / name)
    index = json.loads((folder / INDEX).read_text())
    check_weights(str(folder), small)
    index["weight_map"]["lm_head.weight"] = shard
    (folder / INDEX).write_text(json.dumps(index))
    told = refusal(folder, small)
    assert "files of its own folder" in told or f"which {INDEX} lists" in told


def blobs(folder: Path) -> None:
    """The layout of the hub's cache: names in a snapshot that lead to contents elsewhere."""
    (folder.parent / "blobs").mkdir()
    for number, file in enumerate(folder.iterdir()):
        file.rename(folder.parent / "blobs" / f"{number}")
        file.symlink_to(Path("..", "blobs", f"{number}"))


def elsewhere(folder: Path) -> None:
    """Whoever made a link on this machine could read what it leads to; nothing of it is written anywhere."""
    [file] = folder.glob("model-00002*")
    file.rename(folder.parent / "big.safetensors")
    file.symlink_to((folder.parent / "big.safetensors").absolute())


@pytest.mark.parametrize("link", [blobs, elsewhere])
def test_links_to_files_are_followed(folder: Path, small: Architecture, link: Callable[[Path], None]) -> None:
    link(folder)
    check_weights(str(folder), small)
    source = FolderWeights(folder)
    for name, shape in expected_tensors(small).items():
        assert source.tensor(name, shape, torch.bfloat16, "cpu").shape == shape


def nothing(file: Path) -> None:
    file.symlink_to("gone")


def itself(file: Path) -> None:
    file.symlink_to(file.name)


def endless(file: Path) -> None:
    file.symlink_to("/dev/zero")


def a_pipe(file: Path) -> None:
    os.mkfifo(file)


def a_folder(file: Path) -> None:
    file.mkdir()


def huge(file: Path) -> None:
    file.touch()
    os.truncate(file, 1 << 40)


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00001-of-00002.safetensors", "model.safetensors"])
@pytest.mark.parametrize("thing", [nothing, itself, endless, a_pipe, a_folder, huge])
def test_what_is_no_file_is_refused_and_not_waited_for(
    folder: Path, small: Architecture, name: str, thing: Callable[[Path], None]
) -> None:
    if name == "model.safetensors":
        (folder / INDEX).unlink()
    else:
        (folder / name).unlink()
    thing(folder / name)
    if name == INDEX and thing in (nothing, itself):
        check_weights(str(folder), small)  # as without one
    else:
        assert str(folder) in refusal(folder, small)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.ckpt"])
def test_pickled_weights_are_refused_by_name(folder: Path, small: Architecture, name: str, tmp_path: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / name).write_bytes(pickle.dumps(Burglar(tmp_path / "entered")))
    told = refusal(folder, small)
    assert name in told
    assert "pickle" in told
    assert not (tmp_path / "entered").exists()


def test_a_folder_s_own_code_is_never_imported(start: Start, tmp_path: Path, architecture: Architecture) -> None:
    """There is nothing to switch on: models are built by name, and a folder is its numbers and tensors."""
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(architecture.transformers_config()).save_pretrained(folder)
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'entered')!r}).touch()\nclass Burglar: pass\n"
    for name in ("modeling_burglar.py", "configuration_burglar.py", "tokenization_burglar.py", "__init__.py"):
        (folder / name).write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    maps = {
        "AutoConfig": "configuration_burglar.Burglar",
        "AutoModelForCausalLM": "modeling_burglar.Burglar",
        "AutoTokenizer": ["tokenization_burglar.Burglar", None],
    }
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"auto_map": maps, "trust_remote_code": True, "architectures": ["Burglar"]})
    )
    for name in ("tokenizer_config.json", "generation_config.json", "processor_config.json"):
        (folder / name).write_text(json.dumps({"auto_map": maps, "trust_remote_code": True}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_TRUST_REMOTE_CODE", "1")
        call = start(f"model.weights={folder}", "quant=none,nf4").end()
    assert call.code == 0, call.stderr
    assert [record["outcome"] for record in call.records()] == ["ok", "ok"]
    assert not (tmp_path / "entered").exists()


def test_of_the_hub_only_tensors_and_settings_are_asked_for(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, **wanted: Any) -> str:
        asked.update(wanted, repository=repository)
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    open_weights("owner/name", None, seed=0)
    assert asked["allow_patterns"] == ["*.safetensors", "*.json"]


# rfloor's own code

OURS = [ROOT / "runner.py", *(ROOT / "registry").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "multiprocessing"}
CALLS = {
    *("torch.load", "torch.save", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen"),
    *("eval", "exec", "compile", "__import__", "hydra.utils.instantiate", "instantiate", "hydra.utils.call"),
}
WORDS = {"trust_remote_code", "allow_pickle", "shell"}


@pytest.mark.parametrize("file", OURS, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_code_of_ours_unpickles_evaluates_or_trusts(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            assert not PICKLES & {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in PICKLES
            assert not {"ProcessPoolExecutor"} & {alias.name for alias in node.names}
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in CALLS, ast.unparse(node)
            assert not WORDS & {keyword.arg for keyword in node.keywords}, ast.unparse(node)


def test_a_worker_is_asked_and_answers_in_json(tmp_path: Path) -> None:
    request = {"config": {}, "device": "cpu", "targets": {}, "mean_context": 0.0, "trace": "", "odd": "{}"}
    for asked in (json.dumps(request), "", "{", "[1]", pickle.dumps(Burglar(tmp_path / "entered"), 0).decode()):
        done = subprocess.run(
            [sys.executable, "-m", "registry.worker", str(tmp_path / "answer.json")],
            input=asked,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0
        assert json.loads((tmp_path / "answer.json").read_text())["outcome"] == "crash"
    assert not (tmp_path / "entered").exists()


# The folder that a call is made in


SHADOWS = (
    "registry/__init__.py",
    "registry/worker.py",
    "registry/importing.py",
    "torch.py",
    "safetensors.py",
    "ctypes.py",
)


@pytest.fixture
def shadowed(tmp_path: Path) -> Path:
    """A folder in which what a call imports has namesakes, each of which leaves a mark where it is imported."""
    folder = tmp_path / "shadowed"
    for name in SHADOWS:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'entered')!r}).touch()\n")
    return folder


def test_a_worker_imports_nothing_out_of_the_folder_of_the_call(tmp_path: Path, shadowed: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "runner.py"), "model=tiny", "gpu=cpu", "context=32", "protocol.threads=1"),
            *(f"records={tmp_path}/records", f"cache.folder={tmp_path}/cache"),
            *(f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", f"tracking.artifacts={tmp_path}/artifacts"),
        ],
        cwd=shadowed,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "entered").exists()


def test_nor_does_what_imports_records_or_counts_gpus(
    tmp_path: Path, shadowed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shadowed)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(hardware, "DEV", tmp_path)
    hardware._unseen_gpu()
    (tmp_path / "records").mkdir()
    config = TrackingConfig("local", f"sqlite:///{tmp_path}/mlflow.db", "rfloor", "")
    with importing._helped(tmp_path / "records", config) as helper:
        assert json.loads(helper.communicate()[0]) == {}
    assert not (tmp_path / "entered").exists()


def test_where_a_started_python_imports_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty part of PYTHONPATH is the folder that it starts in; the standard library comes before packages."""
    found = environments.import_path({"PYTHONPATH": ":/plugins:"})
    assert found == {"PYTHONSAFEPATH": "1", "PYTHONPATH": f"{ROOT}:/plugins"}
    assert environments.import_path({})["PYTHONPATH"] == str(ROOT)
    monkeypatch.setattr(environments, "ROOT", Path(sites.getsitepackages()[0]))
    assert environments.import_path({"PYTHONPATH": "/plugins"})["PYTHONPATH"] == "/plugins"


# Loopback


def test_mlflow_s_pages_are_served_on_loopback(monkeypatch: pytest.MonkeyPatch, composer: Composer) -> None:
    """By `make ui`, and by the command that a call ends with; an MLFLOW_HOST of the environment would be obeyed."""
    [recipe] = re.findall(r"^\t.*mlflow ui.*$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "--host 127.0.0.1" in recipe
    printed: list[str] = []
    monkeypatch.setattr("rich.console.Console.print", lambda _, text, **__: printed.append(str(text)))
    sweep._tell_where(set(), composer.cell([]), "/#/x")
    assert re.search(r"mlflow ui .*--host 127\.0\.0\.1 .*then open http://127\.0\.0\.1:5000/#/x$", printed[-1])
    assert composer.cell(["tracking=server"]).tracking.uri.startswith("http://127.0.0.1:")


# Records of others


def test_a_report_runs_no_script_of_a_record(composer: Composer) -> None:
    script = "<script>alert(1)</script>"
    cell = made_up_cell(composer)
    record = made_up_record(
        cell, record_id=script, label=script, reason=script, warnings=[script], started_at="2026-07-01<10:10:10+00:00"
    )
    record.config["model"]["name"] = record.config["quant"]["name"] = script
    record.environment["device"]["name"] = record.environment["git"]["commit"] = script
    report = build(composer.cell(["experiment=matrix"]).experiment, [Observation(record, script)], [])
    assert "<script>alert" not in html(report)
    assert "2026-07-01<10" not in html(report)


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "..", "x\0y", "x" * 300, 5, None, ["x"], {}])
@pytest.mark.parametrize("where", [("model", "name"), ("gpu", "name"), ("protocol", "context"), ("model",)])
def test_an_export_writes_into_its_own_folder(
    tmp_path: Path, composer: Composer, name: object, where: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    record = made_up_record(made_up_cell(composer), experiment="matrix")
    place: Any = record.config
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = name
    record.study["p50_ms"] = 2.0
    records.write(record, tmp_path / "records")
    target = tmp_path / "a" / "b" / "target"
    before = {*tmp_path.rglob("*")}
    assert cli.main(["export", "--study", str(target), str(tmp_path / "records")]) in (0, 1)
    new = {*tmp_path.rglob("*")} - before - {tmp_path / "a", tmp_path / "a" / "b", target}
    assert all(file.parent == target for file in new)
    assert "Traceback" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("thing", [nothing, itself, endless, a_pipe, a_folder, huge])
def test_what_is_no_record_is_told_and_not_waited_for(tmp_path: Path, thing: Callable[[Path], None]) -> None:
    thing(tmp_path / "a.json")
    if thing is not huge:
        thing(tmp_path / ".a.log")
    start = time.monotonic()
    found, [problem] = everything_in(tmp_path)
    logs.finish_abandoned(tmp_path)
    assert time.monotonic() - start < 5
    assert found == []
    assert problem.startswith(f"{tmp_path / 'a.json'}: ")
