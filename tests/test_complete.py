"""What a record has to hold before anything is told of it."""

from typing import Any

import pytest
from test_profile import ONE_PROFILE
from test_record import made_up_cell, made_up_record

from registry.complete import complete
from registry.compose import Composer
from registry.record import BadRecord, Record

STEP: dict[str, tuple[dict[str, Any], str]] = {
    "a commit": ({"environment": {"git": {"commit": 7}}}, "environment.git.commit is a int"),
    "a long time": ({"step_times_ms": [1.0, 1e300]}, "a time is not between 1e-09 and 1e+12"),
    "no time": ({"step_times_ms": [0.0, -1.0]}, "a time is not between"),
    "a large metric": ({"metrics": {"median_tpot_ms": 1e308}}, "a metric is beyond"),
    "a profile": ({"measured": {"profile": "slow"}}, "measured.profile is a str"),
    "a part": ({"measured": {"profile": ONE_PROFILE | {"gap_us": None}}}, "measured.profile.gap_us is missing"),
    "a kernel": ({"measured": {"profile": ONE_PROFILE | {"kernels": {"gemv": 1}}}}, "kernels.gemv is a int"),
    "a count": (
        {"measured": {"profile": ONE_PROFILE | {"operators": {"mm": {"us": 1.0}}}}},
        "measured.profile.operators.mm.count is missing",
    ),
}
CONFIG: dict[str, tuple[str, str, Any, str]] = {
    "a batch beyond 64 bits": ("protocol", "batch_size", 10**30, "config.protocol.batch_size is less than 1, or"),
    "no context": ("protocol", "context", 0, "config.protocol.context is less than 1, or"),
    "a price": ("gpu", "price_usd_per_hour", -1.0, "config.gpu.price_usd_per_hour is not between"),
}
KERNEL: dict[str, tuple[dict[str, Any], str]] = {
    "what may be chosen": ({}, "measured.sdp_enabled is missing"),
    "calls": ({"sdp_enabled": {}, "calls_a_launch": "32"}, "measured.calls_a_launch is a str"),
}


def refusal(record: Record) -> str:
    with pytest.raises(BadRecord) as caught:
        complete(record)
    return str(caught.value)


@pytest.mark.parametrize("damage", STEP)
def test_a_measured_step_that_nobody_can_have_measured_is_refused(composer: Composer, damage: str) -> None:
    changes, told = STEP[damage]
    assert told in refusal(made_up_record(made_up_cell(composer), **changes))


@pytest.mark.parametrize("damage", CONFIG)
def test_a_configuration_that_no_cell_has_is_refused(composer: Composer, damage: str) -> None:
    group, key, value, told = CONFIG[damage]
    record = made_up_record(made_up_cell(composer))
    record.config[group][key] = value
    assert told in refusal(record)


@pytest.mark.parametrize("damage", KERNEL)
def test_a_kernel_alone_without_what_is_told_of_it_is_refused(composer: Composer, damage: str) -> None:
    measured, told = KERNEL[damage]
    record = made_up_record(made_up_cell(composer), kind="attention", call_times_us=[20.0], measured=measured)
    record.metrics = {"median_call_us": 20.0}
    assert told in refusal(record)


def test_a_profile_may_have_parts_of_its_own(composer: Composer) -> None:
    record = made_up_record(made_up_cell(composer), measured={"profile": ONE_PROFILE | {"of tomorrow": []}})
    assert complete(record) is record
