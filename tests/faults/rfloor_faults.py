"""Backends that misbehave on purpose, each in one way.

The tests put this folder on PYTHONPATH, where the entry points beside this file are found as those of an
installed distribution; a worker inherits the path.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.hf import HfBackend
from backends.quant.none import NoQuant
from registry.api import Backend, Requirement, Setup, StepBytes, unsupported

if TYPE_CHECKING:
    from torch import Tensor

NOISE = 5_000_000
FLOOD = 32 << 20
"""Bytes that a log may have."""
HANGING = "hanging now"
ODD_WORDS = f"[/no/tag] [red]text[/] \udcff {'on and on ' * 2000}\nthe second line"
"""Looks like rich's markup, cannot be encoded, is longer than anyone reads, and is two lines."""


class InLoad(Backend):
    """Gets no further than `load`, and so needs no model."""

    def never(self, *_: Any) -> Any:
        raise AssertionError("load has to misbehave")

    prefill = decode_step = seek = position = bytes_per_step = weights = dequantized = never

    def close(self) -> None:
        pass


class Raises(InLoad):
    def load(self, capacity: int) -> None:
        raise ValueError(f"broken on purpose {ODD_WORDS}")


class Refuses(InLoad):
    def load(self, capacity: int) -> None:
        raise unsupported("the model has too few layers", "Use one with more")


class Exhausts(InLoad):
    def load(self, capacity: int) -> None:
        import torch

        torch.empty(1 << 50, dtype=torch.uint8, device=self.setup.device)


class FillsDevice(HfBackend):
    """Takes all of a GPU's memory, a gigabyte at a time, in the middle of a step."""

    def decode_step(self, token: Tensor) -> Tensor:
        import torch

        if self.setup.architecture.layers > 2:
            kept = []
            while True:
                kept.append(torch.empty(1 << 30, dtype=torch.uint8, device="cuda"))
        return super().decode_step(token)


class BreaksContext(HfBackend):
    """Reads where no memory is, after which every call of CUDA in this process fails, whatever it asks for."""

    def decode_step(self, token: Tensor) -> Tensor:
        import torch

        if self.setup.architecture.layers > 2:
            outside = torch.full((1,), 1 << 40, device="cuda")
            torch.zeros(1, device="cuda")[outside].item()
        return super().decode_step(token)


class Killed(InLoad):
    """As the kernel's out-of-memory killer does it; the process that it started lives on."""

    def load(self, capacity: int) -> None:
        subprocess.Popen(["sleep", "600"])
        os.kill(os.getpid(), signal.SIGKILL)


class Segfaults(InLoad):
    def load(self, capacity: int) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)


class Leaves(InLoad):
    """Ends as if all were well, with a long last line."""

    def load(self, capacity: int) -> None:
        print("last words " * 1000, flush=True)
        os._exit(0)


class Hangs(InLoad):
    """Deaf to polite signals, and not alone."""

    def load(self, capacity: int) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        subprocess.Popen(["sleep", "600"])
        subprocess.Popen(bare(), start_new_session=True)
        hang()


class HangsInBuild(HfBackend):
    @classmethod
    def builds(cls, options: Any, device: str) -> str:
        return "a slow extension"

    @classmethod
    def build(cls, options: Any, device: str) -> None:
        subprocess.Popen(["sleep", "600"])
        hang()


class Limited(InLoad):
    """As `ulimit -v` does it."""

    def load(self, capacity: int) -> None:
        import torch

        here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (here + (64 << 20), here + (64 << 20)))
        torch.ones(1 << 30, dtype=torch.uint8)


class OutOfMemory(InLoad):
    """Killed by the kernel in a control group that the test made, whose memory is soon used up."""

    def load(self, capacity: int) -> None:
        Path(os.environ["RFLOOR_TEST_CGROUP"], "cgroup.procs").write_text(str(os.getpid()))
        kept = [b"x" * (1 << 20) for _ in range(1 << 10)]
        raise AssertionError(f"{len(kept)} MiB and still alive")


def bare() -> list[str]:
    """A command that has nothing of its parent's environment, and tells by an argument whose it is."""
    return ["env", "-i", sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)", Path("..").resolve().name]


class Forks(HfBackend):
    """Leaves processes behind that have sessions of their own, and is right nevertheless.

    One is an orphan, one has nothing of its parent's environment, and one is both.
    """

    def load(self, capacity: int) -> None:
        subprocess.Popen(["sleep", "600"], start_new_session=True)
        subprocess.run(["sh", "-c", "setsid sleep 600 >/dev/null 2>&1 &"], check=True)
        subprocess.Popen(bare(), start_new_session=True)
        subprocess.run(["sh", "-c", f"setsid {shlex.join(bare())} >/dev/null 2>&1 &"], check=True)
        super().load(capacity)


class HangsInStep(HfBackend):
    """Passes the check on a two-layer cut, and hangs in a measured step of the whole model."""

    steps = 0

    def decode_step(self, token: Tensor) -> Tensor:
        self.steps += 1
        if self.setup.architecture.layers > 2 and self.steps == 10:
            hang()
        return super().decode_step(token)


class Lingers(HfBackend):
    """Measures well, and never ends for a thread that does not either."""

    def load(self, capacity: int) -> None:
        threading.Thread(target=hang).start()
        super().load(capacity)


class LingersAndRaises(Raises):
    def load(self, capacity: int) -> None:
        threading.Thread(target=hang).start()
        super().load(capacity)


class Waits(HfBackend):
    """Hangs in `load` until the sweep's folder holds a file called go; a worker that finds it decodes well."""

    def load(self, capacity: int) -> None:
        print(HANGING, flush=True)
        while not Path("../go").exists():
            time.sleep(0.05)
        super().load(capacity)


class FailsFirst(HfBackend):
    """Broken until the sweep's folder holds a file called go."""

    def load(self, capacity: int) -> None:
        if not Path("../go").exists():
            raise ValueError("not yet")
        super().load(capacity)


def hang() -> None:
    print(HANGING, flush=True)
    while True:
        time.sleep(600)


class Needs(HfBackend):
    requires = (Requirement("no-such-package-anywhere>=2", "pip install no-such-package-anywhere"),)


COMPILER = """Error building extension 'fast': [1/2] /usr/local/cuda/bin/nvcc -c fast.cu
fast.cu(7): error: identifier "half2" is undefined
1 error detected in the compilation of "fast.cu".
ninja: build stopped: subcommand failed.
"""


class FailsToBuild(HfBackend):
    @classmethod
    def builds(cls, options: Any, device: str) -> str:
        return "a fast extension"

    @classmethod
    def build(cls, options: Any, device: str) -> None:
        raise RuntimeError(COMPILER)


class FallsBack(HfBackend):
    """Says that its step runs a kernel that it never launches."""

    @classmethod
    def kernel_names(cls, options: Any, device: str) -> tuple[str, ...]:
        return ("^fast_kernel",)


class OtherWeights(NoQuant):
    """Multiplies with other weights than it says it holds."""

    def dequantize(self, module: Any) -> Tensor:
        return super().dequantize(module).roll(1, 0)


class Wrong(HfBackend):
    def __init__(self, setup: Setup) -> None:
        super().__init__(replace(setup, linear=OtherWeights(None)))


class Miscounts(HfBackend):
    """Decodes well, and tells of its bytes what nobody can add."""

    def bytes_per_step(self, context: float) -> StepBytes:
        return StepBytes(None, 0)  # type: ignore[arg-type]


def tell_everything(options: Any) -> str:
    """Print all that this process knows, in the ways in which programs print it; some of it, for an exception."""
    print(os.environ)
    print(json.dumps(dict(os.environ), indent=1))
    print("\n".join(f"{name}={value}" for name, value in os.environ.items()))
    print(options, [*os.environ.values()], file=sys.stderr, flush=True)
    subprocess.run(["env"], check=True)  # past Python's own streams
    return f"cannot use {options} with {os.environ.get('AWS_SECRET_ACCESS_KEY')} of {dict(os.environ)}"


@dataclass(frozen=True)
class TalkativeOptions:
    api_key: str = ""
    password: str = ""
    token: str = ""
    pwd: str = ""
    note: str = ""
    hangs: bool = False


class Talks(InLoad):
    """Raises an exception that tells its secrets."""

    Options = TalkativeOptions

    @classmethod
    def builds(cls, options: Any, device: str) -> str:
        return f"a thing with {options.api_key}"

    def load(self, capacity: int) -> None:
        told = tell_everything(self.setup.options)
        if self.setup.options.hangs:
            hang()
        raise ValueError(told)


class TalksAndDies(Talks):
    """Its last words are the answer's reason."""

    def load(self, capacity: int) -> None:
        print(tell_everything(self.setup.options)[:250], flush=True)
        os._exit(3)


class TalksInRefusal(Talks):
    def load(self, capacity: int) -> None:
        raise unsupported(tell_everything(self.setup.options)[:900], f"Use {self.setup.options.api_key}")


class TalksBeforehand(Talks):
    """Asked by the parent, before anything starts."""

    @classmethod
    def check(cls, request: Any) -> None:
        raise ValueError(f"no {request.options} for {os.environ.get('AWS_SECRET_ACCESS_KEY')}")


class TalksAndDecodes(HfBackend):
    """Is right nevertheless."""

    Options = TalkativeOptions
    tags = {"told": os.environ.get("AWS_SECRET_ACCESS_KEY", "")}  # noqa: RUF012 - a class variable of the base

    def load(self, capacity: int) -> None:
        tell_everything(self.setup.options)
        super().load(capacity)


class Annotates(HfBackend):
    """Tells the profiler what it should not."""

    Options = TalkativeOptions

    def decode_step(self, token: Tensor) -> Tensor:
        from torch.profiler import record_function

        with record_function(f"step of {self.setup.options.api_key} and {os.environ['AWS_SECRET_ACCESS_KEY']}"):
            return super().decode_step(token)


class Noisy(HfBackend):
    """Prints more than a pipe holds, and is right nevertheless."""

    def load(self, capacity: int) -> None:
        print("x" * NOISE, flush=True)
        super().load(capacity)


class Floods(InLoad):
    """Prints without end, for all that it knows; what is kept of it does not grow beyond its limit."""

    def load(self, capacity: int) -> None:
        print("the first of many lines")
        for _ in range(40):
            print("one of many lines, which is as long as lines are\n" * 20_000, flush=True)
        deadline = time.monotonic() + 60
        while os.fstat(1).st_size > FLOOD and time.monotonic() < deadline:
            time.sleep(0.01)
        print(f"the last of many lines, {os.fstat(1).st_size >> 20} MiB", flush=True)
        os._exit(3)


class SpoilsReport(HfBackend):
    """Puts a file where MLflow keeps the artifacts of the experiment's own run."""

    def close(self) -> None:
        [registration] = Path("../records/experiments").glob("*.json")
        sha256 = json.loads(registration.read_text())["sha256"]
        for file in list(Path("../../artifacts").rglob("registration.json")):
            if json.loads(file.read_text())["sha256"] == sha256:
                shutil.rmtree(file.parent)
                file.parent.touch()
        super().close()
