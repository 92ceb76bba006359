"""What packing makes of single numbers: what has no scale is named, what has one is half a step off at most."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from mixed import empty, make_case

from rdkv.kernels import naive_rotation
from rdkv.runtime.errors import PluginError


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("what", ["keys", "values"])
def test_what_is_not_finite_is_named(bad: float, width: int, what: str) -> None:
    case = make_case(torch.full((1, 2, 4), width), torch.full((1, 2, 32), width), empty(1, 2, 4))
    getattr(case, what)[0, 1, 2, 3] = bad
    with pytest.raises(PluginError, match=f"{what} are not finite"):
        case.pack()


def test_mean_that_is_not_finite_is_named() -> None:
    case = make_case(torch.full((1, 1, 4), 16), torch.zeros(1, 1, 32), empty(1, 1, 4))
    case.keys[0, 0, 1, 2] = float("inf")
    with pytest.raises(PluginError, match="keys are not finite"):
        case.pack()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("what", "value", "key"), [("keys", 4, 16), ("values", 16, 4)])
def test_what_is_not_finite_at_16_bits_is_named(bad: float, what: str, value: int, key: int) -> None:
    case = make_case(torch.full((1, 1, 4), value), torch.full((1, 1, 32), key), empty(1, 1, 4))
    getattr(case, what)[0, 0, 1, 2] = bad
    with pytest.raises(PluginError, match=f"{what} are not finite"):
        case.pack()


def test_what_exceeds_float16_is_named() -> None:
    case = make_case(torch.full((1, 1, 4), 4), torch.full((1, 1, 32), 4), empty(1, 1, 4))
    case.values[0, 0, 1, 2] = 1e6
    with pytest.raises(PluginError, match=r"values .* range of float16"):
        case.pack()


@pytest.mark.parametrize("low", [-1.0, 0.0, 1000.0, -3e-5])
@pytest.mark.parametrize("span", [1e-6, 0.01, 1.0, 300.0, 60000.0])
def test_codes_of_16_bits_are_half_a_step_off_at_most(low: float, span: float) -> None:
    """``span / 131070``, and what rounding scale and zero point to float16 adds."""
    data = torch.rand(4, 32, generator=torch.Generator().manual_seed(0)) * span + low
    wider = span + max(2.0**-10 * abs(low), 2.0**-24)  # the zero point is up to one float16 number below
    bound = (wider / 65535 * (1 + 2.0**-10) + 2.0**-24) / 2 + 3e-7 * (abs(low) + span)  # and float32 rounds
    for value, key in ((16, 8), (8, 16)):
        case = make_case(torch.full((1, 1, 4), value), torch.full((1, 1, 32), key), empty(1, 1, 4))
        # Values whose rotation is the data: codes are of that.
        keys, values = data.view(1, 1, 4, 32), naive_rotation.restore(data, 32).view(1, 1, 4, 32)
        keys, values, _ = dataclasses.replace(case, keys=keys, values=values).pack().unpack()
        restored = naive_rotation.rotate(values, 32) if value == 16 else keys
        assert float((restored - data).abs().max()) <= bound
