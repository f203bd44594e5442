"""What torch.compile did and why it failed, by its own counters and exceptions.

The counters are those of torch 2.11 to 2.13: Dynamo counts the frames that it looks at, the graphs that it makes of
them and, by reason, where it gave up; Inductor counts the CUDA graphs that it was asked for and did not make.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from registry.failures import out_of_memory, telling_line
from registry.outcome import Outcome, Refused, unsupported

REASON_LIMIT = 160  # characters
MISSING = {
    r"No working C\+\+ compiler|Compiler: .* is not found": "Install g++, or name a C++ compiler in CXX",
    r"Failed to find C compiler": "Install gcc, or name a C compiler in CC",
    r"Cannot find a working triton": "pip install triton",
}
"""What torch.compile says where a compiler is missing -> what brings one."""


@dataclass(frozen=True)
class Compilations:
    """What torch.compile has done.

    Attributes:
        frames: Functions, or what is left of one after a graph break, that Dynamo compiled or gave up.
        graphs: Graphs that it made of them.
        from_cache: Graphs that Inductor had compiled in another process.
        breaks: Graph breaks by their reason, each counted in every frame that it breaks.
        skips: Graphs that were to become CUDA graphs and did not.
        recorded: Inputs that recorded CUDA graphs copy before a replay: more with every recording.
    """

    frames: int
    graphs: int
    from_cache: int
    breaks: Counter[str]
    skips: int
    recorded: int

    @classmethod
    def now(cls) -> Compilations:
        """As this process counts them."""
        from torch._dynamo.utils import counters

        breaks: Counter[str] = Counter()
        for kind in (
            "graph_break",
            "unimplemented",
        ):  # a frame goes on after the one, and is given up after the other
            for reason, count in counters[kind].items():
                breaks[_short(reason)] += count
        inductor = counters["inductor"]
        return cls(
            frames=counters["frames"]["total"],
            graphs=counters["stats"]["unique_graphs"],
            from_cache=inductor["fxgraph_cache_hit"],
            breaks=breaks,
            skips=inductor["cudagraph_skips"],
            recorded=inductor["cudagraph_recorded_non_static_inputs"],
        )

    def since(self, before: Compilations) -> Compilations:
        """What was done after `before`."""
        return Compilations(
            frames=self.frames - before.frames,
            graphs=self.graphs - before.graphs,
            from_cache=self.from_cache - before.from_cache,
            breaks=self.breaks - before.breaks,
            skips=self.skips - before.skips,
            recorded=self.recorded - before.recorded,
        )


def _short(reason: str) -> str:
    """What Dynamo calls a graph break, and what it could not do; its hints and its own context are left out."""
    title, _, rest = reason.strip().partition("\n")
    explanation = re.match(r"\s*Explanation: (.*)", rest)
    return (f"{title}: {explanation[1]}" if explanation else title)[:REASON_LIMIT]


def refusal(error: Exception) -> Exception:
    """What ends a cell whose step cannot be compiled.

    Args:
        error: What calling the compiled step raised.

    Returns:
        `unsupported`, or `missing_dependency` where there is no compiler; as they came, memory that ran out and what
        the device itself reports, which no other setting would mend.
    """
    import torch

    cause: Exception = getattr(error, "inner_exception", error)
    if out_of_memory(cause) or isinstance(cause, torch.AcceleratorError):
        return cause
    text = str(cause)
    # Dynamo and Inductor say it first and explain it afterwards, a compiler's subprocess sends its traceback.
    told = telling_line(cause, otherwise=-1 if "Traceback (most recent call last)" in text else 0)
    for pattern, remedy in MISSING.items():
        if re.search(pattern, text):
            return Refused(Outcome.MISSING_DEPENDENCY, f"torch.compile lacks a compiler: {told}", remedy)
    return unsupported(f"the step cannot be compiled: {told}", "Use execution=eager")
