"""Third-party distributions, really installed: each into a scratch environment that sees rfloor's own."""

import ast
import json
import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent
EXAMPLE = HERE / "plugin_example"


class Environment:
    """A virtual environment with one example distribution in it, and all that rfloor's environment has."""

    def __init__(self, home: Path, source: Path) -> None:
        venv.EnvBuilder(symlinks=True).create(home)
        self.python = home / "bin" / "python"
        [site_packages] = home.glob("lib/python*/site-packages")
        ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        # addsitedir, because a path alone would leave out the .pth file of an editable rfloor
        lines = [f"import site; site.addsitedir({path!r})" for path in sorted(ours)]
        (site_packages / "rfloors_environment.pth").write_text("\n".join(lines))
        self.source = home / "source"  # a copy: building leaves folders behind
        shutil.copytree(source, self.source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
        before = set(source.rglob("*"))
        offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
        done = self.run("-m", "pip", "install", *offline, self.source, cwd=home)
        assert done.returncode == 0, done.stdout + done.stderr
        self.left_behind = set(source.rglob("*")) - before

    def run(self, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        command = [str(self.python), *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)

    def ask(self, code: str) -> object:
        """What `code` prints as JSON, run away from the checkout."""
        done = self.run("-c", code, cwd=self.source.parent)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def measure(self, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
        """Measure the tiny model, everything that is written going to `folder`."""
        return self.run(
            ROOT / "runner.py",
            *overrides,
            "model=tiny",
            "gpu=cpu",
            "context=32",
            f"records={folder}/records",
            f"tracking.uri=sqlite:///{folder}/m.db",
            f"tracking.artifacts={folder}/a",
            cwd=folder,
        )


def records(folder: Path) -> dict[str, dict]:
    """What `Environment.measure` recorded, by the name of the linear format."""
    found = [json.loads(file.read_text()) for file in folder.glob(f"records/{'[0-9a-f]' * 16}/*.json")]
    return {record["config"]["quant"]["name"]: record for record in found}


LOAD = """
import json
from registry.outcome import Refused
from registry.plugins import Catalog
catalog, told = Catalog(), {}
for name in catalog.names("quant"):
    try:
        told[name] = catalog.load("quant", name).__name__
    except Refused as refused:
        told[name] = [refused.refusal.outcome, str(refused)]
print(json.dumps(told))
"""


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("example"), EXAMPLE)


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("broken"), HERE / "plugin_broken")


@pytest.fixture(scope="session")
def clash(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("clash"), HERE / "plugin_clash")


def test_example_is_small_and_imports_the_api_alone() -> None:
    for name in ("int8.py", "int8_gemv.py"):
        assert len((EXAMPLE / "rfloor_example" / name).read_text().splitlines()) < 70
    for file in (EXAMPLE / "rfloor_example").glob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        ours = {module for module in imported if module and module.split(".")[0] in ("registry", "backends")}
        assert ours <= {"registry.api"}, f"{file.name} imports {ours}"


def test_installing_leaves_the_checkout_alone(example: Environment) -> None:
    """Whatever lay there before, a user's own install of the example for one."""
    assert example.left_behind == set()


def test_names_stand_beside_the_built_in_ones(example: Environment) -> None:
    names = example.ask(
        "import json, sys\n"
        "from registry.plugins import KINDS, Catalog\n"
        "names = {kind: Catalog().names(kind) for kind in KINDS}\n"
        "assert 'rfloor_example' not in sys.modules\n"
        "print(json.dumps(names))"
    )
    assert {"none", "nf4", "int8-rowwise"} <= set(names["quant"])
    assert {"hf", "plain"} <= set(names["backend"])


def test_its_yaml_composes(example: Environment) -> None:
    quant = example.ask(
        "import dataclasses, json\n"
        "from registry.compose import Composer\n"
        "from registry.plugins import Catalog\n"
        "cell = Composer(Catalog()).cell(['quant=int8-rowwise'])\n"
        "print(json.dumps(dataclasses.asdict(cell.quant)))"
    )
    assert (quant["name"], quant["plugin"]) == ("int8-rowwise", "int8-rowwise")
    assert (quant["weight_bits"], quant["study_bits"]) == (8, 8)


def test_a_plugin_without_yaml_is_selected_by_name(example: Environment) -> None:
    told = example.ask(
        "import json\n"
        "from registry.api import Backend\n"
        "from registry.compose import Composer\n"
        "from registry.plugins import Catalog\n"
        "catalog = Catalog()\n"
        "composer = Composer(catalog)\n"
        "plugin = composer.cell(['backend=plain']).backend.plugin\n"
        "found = catalog.load('backend', plugin)\n"
        "print(json.dumps([composer.options('backend'), found.__module__, issubclass(found, Backend)]))"
    )
    options, module, is_backend = told
    assert "plain" in options
    assert (module, is_backend) == ("rfloor_example.plain", True)


def test_its_own_tests_pass(example: Environment) -> None:
    done = example.run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=example.source)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_both_plugins_make_a_cell(example: Environment, tmp_path: Path) -> None:
    done = example.measure(tmp_path, "quant=int8-rowwise", "backend=plain", "execution.cache=static")
    assert done.returncode == 0, done.stdout + done.stderr
    [record] = records(tmp_path).values()
    assert record["outcome"] == "ok", record
    assert record["config"]["backend"]["plugin"] == "plain"
    assert {folder.name for folder in (tmp_path / "records").iterdir()} == {record["cell_id"], "sweeps"}


def test_what_is_broken_is_refused_and_nothing_else(broken: Environment) -> None:
    told = broken.ask(LOAD)
    assert (told["none"], told["nf4"]) == ("NoQuant", "Nf4")
    assert told["broken-requirement"] == "Format"
    outcome, message = told["broken-code"]
    assert outcome == "crash"
    assert "RuntimeError: broken on purpose" in message
    assert "rfloor-broken" in message
    for name, culprit in (("broken-import", "rfloor_absent_package"), ("broken-name", "Absent")):
        outcome, message = told[name]
        assert outcome == "missing_dependency"
        assert culprit in message


def test_a_sweep_survives_broken_plugins(broken: Environment, tmp_path: Path) -> None:
    done = broken.measure(tmp_path, "-m", "quant=broken-code,broken-import,none,broken-requirement")
    assert done.returncode == 1, done.stdout + done.stderr
    assert {name: record["outcome"] for name, record in records(tmp_path).items()} == {
        "broken-code": "crash",
        "broken-import": "missing_dependency",
        "none": "ok",
        "broken-requirement": "missing_dependency",
    }


def test_a_name_claimed_twice_is_refused_and_no_other(clash: Environment) -> None:
    told = clash.ask(LOAD)
    outcome, message = told["nf4"]
    assert outcome == "missing_dependency"
    assert "rfloor and by rfloor-clash" in message
    assert "pip uninstall rfloor-clash" in message
    assert told["none"] == "NoQuant"
