"""What the fuzzing draws from, how it damages files, and the bounds within which everything has to stay."""

import contextlib
import copy
import io
import json
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FUZZING = settings.get_current_profile_name() == "fuzz"
CPU_S = 20.0
"""Seconds of computing that one case may take; most take milliseconds."""
WALL_S = 120.0
"""Seconds that one case may take with all that it waits for, which is a busy machine too."""
GROWTH_MB = 512
"""By how much the largest memory that this process ever had may grow in one case."""
ADDRESSES = 4 << 30
"""Bytes of addresses that one case may add to what this process has: a request for more fails and harms nobody."""


def cases(few: int, many: int) -> Any:
    """How many cases a test takes: few in the suite, many in `make fuzz`."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=many if FUZZING else few, suppress_health_check=slow, deadline=None)


# Bounds


class TooLong(BaseException):
    """No handler of an Exception may take it for its own."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """What takes too long or too much memory fails here, and leaves the rest of the machine alone."""

    def too_long(*_: object) -> None:
        raise TooLong

    peak, hard = _peak_mb(), resource.getrlimit(resource.RLIMIT_AS)[1]
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = signal.signal(signal.SIGVTALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESSES, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
    waits = threading.Timer(WALL_S, signal.pthread_kill, (threading.get_ident(), signal.SIGVTALRM))
    waits.daemon = True
    waits.start()  # and not the other timer, which is pytest-timeout's
    start = time.process_time()
    try:
        yield
    except TooLong:
        raise AssertionError(f"more than {CPU_S:.0f} s of computing, or {WALL_S:.0f} s in all") from None
    finally:
        waits.cancel()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY if hard < 0 else hard, hard))
        signal.signal(signal.SIGVTALRM, before)
    assert time.process_time() - start < CPU_S
    assert _peak_mb() - peak < GROWTH_MB


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# What a user sees


@dataclass
class Told:
    """What a call said, and the code that it ended with; `None` where it gave back something else."""

    code: Any
    out: str
    err: str


def tell(call: Callable[[], Any]) -> Told:
    """Make a call with streams that take what a terminal's take, and no more: no lone surrogate on stdout."""
    kept = sys.stdout, sys.stderr
    out, err = io.BytesIO(), io.BytesIO()
    sys.stdout = io.TextIOWrapper(out, encoding="utf-8", write_through=True)
    sys.stderr = io.TextIOWrapper(err, encoding="utf-8", errors="backslashreplace", write_through=True)
    streams = sys.stdout, sys.stderr
    try:
        with bounded():
            try:
                code = call()
            except SystemExit as ended:
                code = ended.code
    finally:
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = kept
    told = Told(code, out.getvalue().decode(), err.getvalue().decode(errors="surrogateescape"))
    assert "Traceback" not in told.out + told.err
    return told


# Values


SPITEFUL = (
    *("", " ", "\n", "\x00", "\x1b[31m", "é", "\u202e", "\U0001f600", "\ud800", "\udcff", "\ufeff", "a" * 300),
    *("..", "/", "../../x", "/dev/null", "/dev/zero", "/proc/self/mem", "~", "~nobody", "~no-such-user", "."),
    *("null", "true", "nan", "-inf", "1e999", "0x10", "1_000", "-0", "???", "_target_", "${", "${a", "${model.name}"),
    *("[red]", "[/]", "[link=x]", "<script>", "%s", "{}", "{0}", "'", '"', "\\", "`", "a=b", "--help"),
    "hf_" + "a1" * 17,
    *("0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "2026-07-01T10:10:10+00:00", "2026-W27-1T10Z"),
)
SIZES = (0, 1, -1, 2, 7, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 10**400)
FLOATS = (0.0, -0.0, 0.5, 1e-320, 1e-300, 1e300, 1.7e308, -1.7e308, float("nan"), float("inf"), float("-inf"))
TEXTS = st.sampled_from(SPITEFUL) | st.text(max_size=8) | st.text(st.characters(), max_size=8)
SCALARS = (
    st.none() | st.booleans() | st.sampled_from(SIZES) | st.integers() | st.sampled_from(FLOATS) | st.floats() | TEXTS
)
DEEP = "\x00deep\x00"
"""Stands for a value that is nested too deeply for a writer of JSON."""
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
) | st.sampled_from([[], {}, [[]], DEEP])


# Damage


def damaged(data: st.DataObject, content: Any) -> Any:
    """A JSON value of which a few places are dropped, replaced, doubled or put elsewhere."""
    content = json.loads(json.dumps(content))
    if data.draw(st.integers(0, 30)) == 0:
        return copy.deepcopy(data.draw(JSON))
    for _ in range(data.draw(st.integers(1, 4))):
        node, key = _place(data, content)
        if key is None:
            continue
        kind = data.draw(st.sampled_from(["replace", "replace", "replace", "drop", "add", "double", "swap"]))
        if kind == "replace":
            node[key] = copy.deepcopy(data.draw(JSON))
        elif kind == "drop":
            del node[key]
        elif kind == "add" and isinstance(node, dict):
            node[data.draw(TEXTS)] = copy.deepcopy(data.draw(JSON))
        elif kind == "double" and isinstance(node, list):
            node *= data.draw(st.integers(2, 50))
        else:
            other, there = _place(data, content)
            if there is not None:
                node[key] = copy.deepcopy(other[there])
    return content


def _place(data: st.DataObject, content: Any) -> tuple[Any, Any]:
    """A node and a key in it, however deep; no key where the content is empty."""
    node, key = content, None
    while isinstance(node, dict | list) and node:
        inner: Any = node
        key = data.draw(st.sampled_from(sorted(node)) if isinstance(node, dict) else st.integers(0, len(node) - 1))
        node = inner[key]
        if not (isinstance(node, dict | list) and node) or data.draw(st.integers(0, 3)) == 0:
            return inner, key
    return content, None


def as_bytes(data: st.DataObject, content: Any, **form: Any) -> bytes:
    """A JSON value as a file's bytes, in some cases damaged once more."""
    text = json.dumps(content, **form)
    depth = data.draw(st.sampled_from([10, 500, 100_000])) if json.dumps(DEEP) in text else 0
    whole = text.replace(json.dumps(DEEP), "[" * depth + "]" * depth).encode()
    return damaged_bytes(data, whole) if data.draw(st.integers(0, 3)) == 0 else whole


def damaged_bytes(data: st.DataObject, whole: bytes) -> bytes:
    """A file that was cut short, or of which some bytes are others."""
    start = data.draw(st.integers(0, len(whole)))
    if data.draw(st.booleans()):
        return whole[:start]
    length = data.draw(st.integers(0, 20))
    patch = data.draw(st.binary(max_size=8) | st.sampled_from([b"", b"0", b'"', b"}", b"]", b"1e999", b"\\ud800"]))
    return whole[:start] + patch + whole[start + length :]


# Command lines


FLAGS = (
    *("-m", "--multirun", "--help", "-h", "--hydra-help", "--version", "--cfg", "--cfg=job", "-c=all", "-c", "job"),
    *("--resolve", "-r", "--package", "--package=model", "-p", "--run", "--info", "--info=all", "-i=defaults", "--"),
    *("--config-path=x", "-cp", "--config-name=x", "-cn", "--config-dir=/", "-cd", "--experimental-rerun=x", "-x"),
    *("--shell-completion", "-sc", "install=bash", "query=bash", "query=fish", "uninstall=zsh", "--inf", "--mul"),
)
ABOUT = (
    *(["--help"], ["--hydra-help"], ["--cfg", "job"], ["--cfg", "all"], ["--cfg", "hydra"], ["--info"]),
    *(["--info", "all"], ["--info", "config"], ["--info", "defaults"], ["--info", "plugins"]),
    ["--info", "searchpath"],
    *(["--cfg", "job", "--package", "model"], ["--cfg", "job", "--resolve"], ["--info", "defaults-tree"]),
    *(["--cfg", "job", "--help"], ["--cfg", "job", "--info"], ["--run", "--cfg", "job"], ["-sc", "install=bash"]),
)
HYDRA = (
    *("hydra.verbose", "hydra/launcher", "hydra.launcher.n_jobs", "hydra.launcher._target_", "hydra", "hydra.mode"),
    *("hydra.run.dir", "hydra.sweep.dir", "hydra.job.env_set", "hydra.searchpath", "hydra/job_logging"),
    *("hydra.output_subdir", "hydra.callbacks.x", "hydra.sweeper.params", "hydra/sweeper", "hydra.runtime.cwd"),
)
QUOTABLE = st.text(st.characters(exclude_characters="'\\"), max_size=8)


@dataclass(frozen=True)
class Grammar:
    """Strategies for command lines, made of what there really is.

    Attributes:
        options: Each config group's.
        leaves: Every key with the value that it has.
    """

    options: dict[str, list[str]]
    leaves: dict[str, Any]

    def calls(self) -> st.SearchStrategy[list[str]]:
        """Whole command lines."""
        plausible = st.lists(self.plausible(), max_size=4)
        several = st.lists(self.override(), max_size=3)
        mutated = several.flatmap(lambda texts: st.tuples(*map(mutant, texts)).map(list))
        flagged = st.lists(st.sampled_from(FLAGS) | self.override(), max_size=4)
        begins = st.sampled_from([[], ["-m"], ["-m"], ["--multirun"]])
        rest = plausible | plausible | several | several | mutated | flagged
        return st.tuples(begins, rest).map(lambda parts: [*parts[0], *parts[1]])

    def plausible(self) -> st.SearchStrategy[str]:
        """An override that a user might type: a real key, a real option or a value of the key's type."""
        leaves = {key: value for key, value in self.leaves.items() if not isinstance(value, dict | list)}
        chosen = st.sampled_from(sorted(leaves)).flatmap(lambda key: near(leaves[key]).map(lambda v: f"{key}={v}"))
        return self.choice() | self.choice() | chosen

    def choice(self) -> st.SearchStrategy[str]:
        """An option of a group, or a sweep over some."""

        def chosen(group: str) -> st.SearchStrategy[str]:
            names = st.lists(st.sampled_from(self.options[group]), min_size=1, max_size=3, unique=True)
            return names.map(lambda found: f"{group}={','.join(found)}")

        return st.sampled_from(sorted(self.options)).flatmap(chosen)

    def override(self) -> st.SearchStrategy[str]:
        """Anything that Hydra's grammar has a form for."""
        keys = st.sampled_from([*self.leaves, *self.options, *HYDRA, "context", "modle", "a.b", ""])
        prefix = st.sampled_from(["", "", "", "", "+", "++", "~"])
        package = st.sampled_from(["", "", "", "", "", "", "@model", "@_global_", "@a:b", "@", "@hydra.job"])
        between = st.sampled_from(["=", "=", "=", "=", "=", "", " = ", "=="])
        return st.tuples(prefix, keys, package, between, self.value()).map("".join)

    def value(self) -> st.SearchStrategy[str]:
        """What may stand behind the =."""
        names = st.sampled_from([name for group in self.options.values() for name in group])
        inner = SCALARS.map(str) | QUOTABLE.map(lambda text: f"'{text}'") | names
        some = st.lists(inner, max_size=4).map(",".join)
        nested = st.recursive(
            inner,
            lambda part: (
                st.lists(part, max_size=3).map(lambda parts: f"[{','.join(parts)}]")
                | st.lists(st.tuples(names, part), max_size=3).map(
                    lambda pairs: "{" + ",".join(f"{key}:{value}" for key, value in pairs) + "}"
                )
            ),
            max_leaves=5,
        )
        number = st.sampled_from(["0", "1", "5", "-3", "0.5", "1e9", "nan", "inf", "1e-320", "10000000000000000"])
        called = st.tuples(
            st.sampled_from(["range", "choice", "interval", "glob", "sort", "shuffle", "tag", "int", "float", "str"]),
            st.lists(number | names | st.sampled_from(["*", "[1,2]", "a*", "reverse=true", "exclude=a"]), max_size=4),
        ).map(lambda parts: f"{parts[0]}({','.join(parts[1])})")
        references = st.sampled_from([*self.leaves, "hydra.job.num", "..name", "", "model", "context"])
        looked_up = references.map(lambda key: "${" + key + "}")
        resolved = st.tuples(
            st.sampled_from(["oc.env", "oc.create", "oc.decode", "oc.select", "oc.deprecated", "oc.dict.keys", "no"]),
            st.sampled_from(["HOME", "NO_SUCH_NAME", "model", "[1", "'x'", "${context}", ""]),
        ).map(lambda parts: "${" + ":".join(parts) + "}")
        return inner | some | some | nested | called | looked_up | resolved | TEXTS


def commands(grammar: Grammar, records: Path, target: Path) -> st.SearchStrategy[list[str]]:
    """Arguments of the `rfloor` command.

    Args:
        grammar: What overrides are made of.
        records: A folder of records.
        target: Where something may be written.
    """
    whole_disk = ("/", "..", "../../x")
    spiteful = st.sampled_from([text for text in SPITEFUL if text not in whole_disk])
    folders = st.sampled_from([str(records), str(records), ".", "no-such-folder", __file__]) | spiteful
    targets = st.sampled_from([str(target), str(target), "/dev/null", "/dev/null/x", f"{records}/sweeps"])
    given = st.sampled_from(
        ["out", "sweep", "price.h200", "price.h20", "price.", "tracking.uri", "tracking", "model"]
    )
    pairs = st.tuples(given, near("x") | near(0.5) | TEXTS).map("=".join).filter(lambda text: text[:4] != "out=")
    override = pairs | grammar.plausible() | grammar.override() | targets.map(lambda folder: f"out={folder}")
    safe = override.filter(lambda text: not text.startswith("out=") or text[4:5] == "/")
    overrides = st.just([]) | st.lists(safe, max_size=3)
    experiments = st.sampled_from([*grammar.options["experiment"], "graphs_a"]) | TEXTS
    known = st.sampled_from([file.stem for file in records.glob("sweeps/*.json")])
    written = targets.map(lambda folder: [f"out={folder}"])
    form = st.sampled_from([[], ["quant=gptq"], ["quant=int4"], ["model=tiny", "quant=gptq"]])
    parts = {
        "status": (folders.map(lambda one: [one]), st.lists(known | TEXTS, max_size=2)),
        "export": (targets.map(lambda one: ["--study", one]), folders.map(lambda one: [one])),
        "import": (folders.map(lambda one: [one]), overrides),
        "report": (experiments.map(lambda one: [one]), overrides),
        "synthesize": (written, form, overrides),
    }
    told = [st.tuples(st.just([name]), *own).map(lambda found: [*chain(*found)]) for name, own in parts.items()]
    flags = st.sampled_from(["--help", "-h", "--study", "--", "--version", "-x", "stat", "statu", ""])
    strange = st.tuples(st.sampled_from([*parts, "stat", ""]), flags, folders).map(list)
    return st.one_of(*told, st.lists(flags, max_size=2), strange)


def near(value: Any) -> st.SearchStrategy[str]:
    """Texts of values of a value's own type, in and out of range, and sweeps over some."""
    if isinstance(value, bool):
        one: st.SearchStrategy[str] = st.sampled_from(["true", "false"])
    elif isinstance(value, int):
        one = (st.integers(-2, 5000) | st.sampled_from(SIZES)).map(str)
    elif isinstance(value, float):
        one = (st.floats(0, 1e6) | st.sampled_from(FLOATS)).map(str)
    elif value is None:
        one = st.sampled_from(["null", "1", "0.5", "x", "-1"])
    else:
        one = st.sampled_from([str(value), "x", "null", "''"]) | QUOTABLE.map(lambda text: f"'{text}'")
    return st.lists(one, min_size=1, max_size=3).map(",".join)


def mutant(text: str) -> st.SearchStrategy[str]:
    """A text of which some characters are others, missing or new."""

    def change(edits: Sequence[tuple[int, int, str]]) -> str:
        changed = text
        for place, length, patch in edits:
            start = place % (len(changed) + 1)
            changed = changed[:start] + patch + changed[start + length :]
        return changed

    patch = st.sampled_from(["", *"=,.'\"{}[]()$@\\ 9~"])
    edit = st.tuples(st.integers(0, 200), st.integers(0, 3), patch | st.text(max_size=2))
    return st.lists(edit, min_size=1, max_size=3).map(change)
