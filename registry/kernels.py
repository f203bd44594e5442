"""Which kernels a step really launches: by name and count, seen by torch's profiler in a pass of its own.

The pass comes after everything that is timed: a profiler that has run once leaves its hooks in the process.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from registry.outcome import unsupported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

VIEWS = re.compile(
    r"aten::_?(alias|as_strided|contiguous|detach|empty|expand|flatten|lift_fresh|narrow|permute|reshape|resize|"
    r"resolve_conj|result_type|select|slice|split|squeeze|t$|to$|transpose|unbind|unflatten|unsqueeze|view|unsafe_view)"
)
"""Operators that only look at a tensor in another way, or make room for one."""

NAMESPACES = re.compile(r"\b(at::native|c10|std)::")
"""What PyTorch's kernels and their template arguments all begin with."""
ARGUMENTS = 120
"""Characters of template arguments that tell variants of a kernel apart."""
TOLD = 8
"""Kernels that a message names."""


def seen(step: Callable[[], None], device: str) -> dict[str, int]:
    """Kernels of one step, the most frequent first; none where the profiler is kept from looking.

    On CUDA what ran on the device; on the CPU, which has no kernels to tell apart, the operators that do some work.

    Args:
        step: Launches one step.
        device: `cpu` or `cuda`.
    """
    import torch
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    events = profiler.events() or []
    if device == "cuda":
        names = [event.name for event in events if event.device_type == DeviceType.CUDA]
        names = [name for name in names if not name.startswith(("Memcpy", "Memset"))]
    else:
        names = [event.name for event in events if "::" in event.name and not VIEWS.match(event.name)]
    return dict(Counter(names).most_common())


def require(kernels: Mapping[str, int], wanted: Iterable[tuple[str, str]]) -> None:
    """Refuse a step in which a kernel that was asked for did not run.

    Args:
        kernels: As `seen` tells them; where none was seen nothing is refused.
        wanted: Who asked, and a regular expression that one name at least has to contain.

    Raises:
        Refused: `unsupported`: something else ran in its place.
    """
    for who, pattern in wanted:
        if kernels and not any(re.search(pattern, name) for name in kernels):
            raise unsupported(
                f"{who} asked for a kernel like {pattern!r}, and none ran; "
                f"the step launched {', '.join([*short(kernels)][:TOLD])}"
            )


def short(kernels: Mapping[str, int]) -> dict[str, int]:
    """Bare names and how often they ran together: the most frequent first, PyTorch's own elementwise ones last."""
    counts: Counter[str] = Counter()
    for name, count in kernels.items():
        counts[bare(name)] += count
    return dict(sorted(counts.items(), key=lambda one: (one[0].startswith("at::"), -one[1])))


def apart(names: Iterable[str]) -> dict[str, str]:
    """What to call each of these kernels, by full name: the bare name where it tells it from the others.

    Variants of one kernel have their template arguments behind it, and a number where so much of them is the same.
    """
    full = [*names]
    several = Counter(map(bare, full))
    told: dict[str, str] = {}
    met: Counter[str] = Counter()
    for name in full:
        short_name = bare(name)
        if several[short_name] > 1:
            arguments = NAMESPACES.sub("", name.removeprefix("void ").replace("(anonymous namespace)::", ""))
            arguments = arguments[len(NAMESPACES.sub("", short_name)) :]
            short_name += arguments if len(arguments) <= ARGUMENTS else f"{arguments[:ARGUMENTS]}..."
        met[short_name] += 1
        told[name] = f"{short_name} #{met[short_name]}" if met[short_name] > 1 else short_name
    return told


def bare(name: str) -> str:
    """A kernel's name without template arguments, parameters and return type."""
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", plain, maxsplit=1)[0].strip() or name
