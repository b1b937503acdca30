"""Sigmas, warped steps, noising and flow against the golden data."""

import pytest
import torch
from echo_infinity.schedule import TRAIN_STEPS, FlowSchedule
from micro import load
from numerics import assert_golden, assert_no_worse_than, assert_same_bits

SHIFTS = [5, 8]


@pytest.fixture(scope="module")
def golden():
    return load("scheduler")


@pytest.mark.parametrize("shift", SHIFTS)
def test_tables_match_golden_data(golden, shift):
    _, tensors = golden
    schedule = FlowSchedule(shift)
    assert schedule.sigmas.dtype == schedule.timesteps.dtype == torch.float32
    assert_golden(schedule.sigmas, tensors[f"shift{shift}.sigmas"])
    timesteps = tensors[f"shift{shift}.timesteps"]
    assert_golden(schedule.timesteps / TRAIN_STEPS, timesteps / TRAIN_STEPS)


@pytest.mark.parametrize("shift", SHIFTS)
def test_warped_steps_are_indices_into_the_shifted_table(golden, shift):
    settings, _ = golden
    expected = settings[f"shift{shift}"]
    assert FlowSchedule(shift).warp(tuple(expected["unwarped"])) == expected["warped"]
    assert FlowSchedule(shift).warp((1000, 1, 0)) == [1000.0, FlowSchedule(shift).timesteps[-1].item(), 0.0]


@pytest.mark.parametrize("shift", SHIFTS)
def test_any_timestep_takes_the_nearest_sigma(golden, shift):
    expected = golden[0][f"shift{shift}"]
    schedule = FlowSchedule(shift)
    for t, index, sigma in zip(expected["query_t"], expected["query_index"], expected["query_sigma"], strict=True):
        assert schedule.sigma(t) == schedule.sigmas[index].item() == sigma


@pytest.mark.parametrize("shift", SHIFTS)
def test_noising_and_flow_match_golden_data(golden, shift):
    tensors = {name.removeprefix(f"shift{shift}."): x for name, x in golden[1].items()}
    schedule = FlowSchedule(shift)
    for i, t in enumerate(tensors["t"].tolist()):
        x0, noise, flow = (tensors[name][i] for name in ("x0", "noise", "flow"))
        x_t = schedule.add_noise(x0, noise, t)
        assert_golden(x_t, tensors["add_noise"][i])
        assert_golden(schedule.to_x0(noise, flow, t), tensors["flow_to_x0"][i])  # the file takes pure noise for x_t
        # At t = 0 the flow is 700 large: compare what was divided by sigma.
        sigma = schedule.sigma(t)
        assert_golden(schedule.to_flow(noise, x0, t) * sigma, tensors["x0_to_flow"][i] * sigma)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_x0_is_recovered_from_the_true_flow_in_its_own_dtype(dtype):
    schedule = FlowSchedule(5.0)
    x0, noise = torch.randn(2, 4, 6, 8, dtype=torch.float64), torch.randn(2, 4, 6, 8, dtype=torch.float64)
    for t in schedule.warp((1000, 750, 500, 250)):
        x_t = schedule.add_noise(x0, noise, t)
        out = schedule.to_x0(x_t.to(dtype), (noise - x0).to(dtype), t)
        wide = x_t.to(dtype).double() - schedule.sigma(t) * (noise - x0).to(dtype).double()
        assert_same_bits(out, wide.to(dtype))
        assert_no_worse_than(schedule.to_flow(x_t, x0, t), noise - x0, noise - x0)


def test_shift_1_is_the_linear_schedule():
    schedule = FlowSchedule(1.0)
    assert_no_worse_than(schedule.sigmas, schedule.sigmas, torch.arange(1000, 0, -1).double() / 1000)
    assert schedule.warp((500,)) == [pytest.approx(500)]


@pytest.mark.parametrize("shift", [0, -1.0])
def test_rejects_a_shift_that_is_not_positive(shift):
    with pytest.raises(ValueError, match=f"shift must be positive, got {shift}"):
        FlowSchedule(shift)


@pytest.mark.parametrize("step", [1001, -1, 750.5])
def test_rejects_steps_that_are_not_in_the_table(step):
    with pytest.raises(ValueError, match=r"steps must be whole numbers in 0 \.\. 1000, got .*" + str(step)):
        FlowSchedule().warp((1000, step))
