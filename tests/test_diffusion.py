"""The algebra of ldm.diffusion: one line and its inverses, against themselves, calculus and diffusers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from ldm.diffusion import PREDICTIONS, add_noise, target, to_x0_eps
from ldm.errors import LDMError
from ldm.schedules import ScheduleConfig, alpha_bars

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP = [p for p in PREDICTIONS if p != "flow"]


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def levels(prediction):
    """(alpha, sigma), each (1000, 1, 1, 1): every training step of Stable Diffusion, or a thousand points of flow."""
    if prediction == "flow":
        sigma = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
        alpha = 1 - sigma
    else:
        bar = alpha_bars(ScheduleConfig(**SD)).double()
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    return alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_to_x0_eps_recovers_what_target_was_made_of(prediction):
    alpha, sigma = levels(prediction)
    x0, eps = normal(0, 1000, 2, 3, 4), normal(1, 1000, 2, 3, 4)
    out = target(x0, eps, alpha, sigma, prediction)
    p = to_x0_eps(out, add_noise(x0, eps, alpha, sigma), alpha, sigma, prediction)
    assert p.cond is None and p.uncond is None
    # Dividing by alpha or sigma as small as 0.03 costs two digits of sixteen.
    torch.testing.assert_close(p.x0, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(p.eps, eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_any_output_is_the_target_of_the_pair_it_becomes(prediction):
    """The other way round, with an output that no (x0, eps) suggested: target and to_x0_eps are inverse maps."""
    alpha, sigma = levels(prediction)
    out, x = normal(2, 1000, 2, 3, 4), normal(3, 1000, 2, 3, 4)
    x0, eps, *_ = to_x0_eps(out, x, alpha, sigma, prediction)
    torch.testing.assert_close(target(x0, eps, alpha, sigma, prediction), out, rtol=0, atol=1e-12)
    torch.testing.assert_close(add_noise(x0, eps, alpha, sigma), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_level_may_be_a_number_or_a_tensor(prediction):
    alpha, sigma = levels(prediction)
    out, x = normal(2, 1000, 2, 3, 4), normal(3, 1000, 2, 3, 4)
    whole = to_x0_eps(out, x, alpha, sigma, prediction)
    for i in (0, 1, 500, 999):
        one = to_x0_eps(out[i], x[i], alpha[i].item(), sigma[i].item(), prediction)
        assert torch.equal(one.x0, whole.x0[i]) and torch.equal(one.eps, whole.eps[i])


@pytest.mark.parametrize(
    "prediction, alpha, sigma",
    [
        ("v_prediction", 0, 1),
        ("v_prediction", 1, 0),
        ("flow", 0, 1),
        ("flow", 1, 0),
        ("epsilon", 1, 0),
        ("sample", 0, 1),
    ],
)
def test_at_the_ends_the_pair_is_exact_where_the_output_determines_it(prediction, alpha, sigma):
    x0, eps = normal(0, 2, 3, 4), normal(1, 2, 3, 4)
    x = add_noise(x0, eps, alpha, sigma)
    p = to_x0_eps(target(x0, eps, alpha, sigma, prediction), x, alpha, sigma, prediction)
    torch.testing.assert_close(p.x0, x0, rtol=0, atol=1e-15)
    torch.testing.assert_close(p.eps, eps, rtol=0, atol=1e-15)


def test_velocities_are_the_derivatives_they_are_named_after():
    """v = dx/d(angle) on the circle alpha = cos, sigma = sin; flow = dx/d(sigma) on the line alpha = 1 - sigma."""
    x0, eps, h = normal(0, 2, 3, 4), normal(1, 2, 3, 4), 1e-5
    for at in (0.1, 0.5, 0.9):

        def on_circle(a):
            return add_noise(x0, eps, math.cos(a), math.sin(a))

        def on_line(s):
            return add_noise(x0, eps, 1 - s, s)

        v = (on_circle(at + h) - on_circle(at - h)) / (2 * h)
        flow = (on_line(at + h) - on_line(at - h)) / (2 * h)
        torch.testing.assert_close(target(x0, eps, math.cos(at), math.sin(at), "v_prediction"), v, rtol=0, atol=1e-9)
        torch.testing.assert_close(target(x0, eps, 1 - at, at, "flow"), flow, rtol=0, atol=1e-9)


@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler])
def test_add_noise_and_velocity_equal_diffusers(cls):
    alpha, sigma = levels("v_prediction")
    x0, eps, t = normal(0, 1000, 2, 3, 4), normal(1, 1000, 2, 3, 4), torch.arange(1000)
    scheduler = cls(**SD)
    x, v = scheduler.add_noise(x0, eps, t), scheduler.get_velocity(x0, eps, t)
    assert x.std() > 0.9 and v.std() > 0.9 and (x - v).std() > 0.9
    torch.testing.assert_close(add_noise(x0, eps, alpha, sigma), x, rtol=0, atol=1e-14)
    torch.testing.assert_close(target(x0, eps, alpha, sigma, "v_prediction"), v, rtol=0, atol=1e-14)


def test_flow_noise_equals_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    x0, eps = normal(0, 1000, 2, 3, 4), normal(1, 1000, 2, 3, 4)
    sigma = scheduler.sigmas.double().view(-1, 1, 1, 1)
    reference = scheduler.scale_noise(x0, scheduler.timesteps, eps)
    assert reference.std() > 0.5
    torch.testing.assert_close(add_noise(x0, eps, 1 - sigma, sigma), reference, rtol=0, atol=1e-14)


@pytest.mark.parametrize("prediction", VP)
def test_x0_equals_the_one_diffusers_predicts(prediction):
    scheduler = DDPMScheduler(**SD, prediction_type=prediction, clip_sample=False)
    alpha, sigma = levels(prediction)
    out, x = normal(2, 1000, 2, 3, 4).float(), normal(3, 1000, 2, 3, 4).float()
    for t in (1, 250, 500, 999):
        reference = scheduler.step(out[t], t, x[t], generator=torch.Generator()).pred_original_sample
        p = to_x0_eps(out[t], x[t], alpha[t].item(), sigma[t].item(), prediction)
        assert reference.std() > 0.5
        torch.testing.assert_close(p.x0, reference, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("prediction", ["v", "eps", "", None])
def test_an_unknown_prediction_is_named_with_what_is_known(prediction):
    x = normal(0, 2, 3, 4)
    for call in (target, to_x0_eps):
        with pytest.raises(LDMError, match=r"prediction type .* epsilon, v_prediction, sample, flow"):
            call(x, x, 0.6, 0.8, prediction)
