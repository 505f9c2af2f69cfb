"""What holds for every sampler and schedule, whatever the numbers: hypothesis looks for those for which it doesn't."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import normal

from ldm.diffusion import Prediction, add_noise, to_x0_eps
from ldm.errors import LDMError
from ldm.noise import Noise
from ldm.samplers import SAMPLERS
from ldm.samplers.multistep import deis, dpm, dpmpp, weights
from ldm.samplers.onestep import ddim, euler, tcd
from ldm.sampling import sample
from ldm.schedules import CHOICES, RULES, Level, Schedule, ScheduleConfig, alpha_bars, make_schedule
from ldm.schedules.config import SPACINGS, find_rule
from ldm.schedules.spacing import most_steps
from ldm.schedules.table import timestep_of

examples = partial(settings, deadline=None, derandomize=True, database=None)
numbers = partial(st.floats, allow_nan=False, allow_infinity=False)

FIRST_ORDER = {
    "ddim": ddim,
    "euler": euler,
    "dpm++1": partial(dpmpp, order=1, sde=False),
    "dpm1": partial(dpm, order=1),
    "deis1": partial(deis, order=1),
    "tcd eta=0": partial(tcd, eta=0.0),
}
ALL = {name: method.step for name, method in SAMPLERS.items()} | {"ddim eta=0.6": partial(ddim, eta=0.6)}
every_sampler = st.sampled_from(sorted(ALL))


@st.composite
def configs(draw):
    """Any configuration that ldm reads, as a file might have it, with any rule."""
    rule = draw(st.sampled_from(sorted(RULES)))
    total = draw(st.sampled_from([1000, 1000, 200, 37]))
    if rule == "flow":
        dynamic = draw(st.booleans())
        return ScheduleConfig(
            num_train_timesteps=total,
            prediction_type="flow",
            rule="flow",
            shift=draw(numbers(0.5, 8)),
            use_dynamic_shifting=dynamic,
            time_shift_type=draw(st.sampled_from(["exponential", "linear"])),
            shift_terminal=draw(st.sampled_from([None, None, 0.02, 0.1])),
        )
    zero_snr = draw(st.booleans())
    return ScheduleConfig(
        num_train_timesteps=total,
        beta_schedule=draw(st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"])),
        beta_start=draw(numbers(1e-5, 2e-3)),
        beta_end=draw(numbers(5e-3, 3e-2)),
        prediction_type="v_prediction" if zero_snr else draw(st.sampled_from(["epsilon", "v_prediction", "sample"])),
        rescale_betas_zero_snr=zero_snr,
        original_inference_steps=draw(st.sampled_from([k for k in (50, 20) if k <= total])),
        timestep_spacing=draw(st.sampled_from([None, *SPACINGS])),
        steps_offset=draw(st.integers(0, 1)),
        set_alpha_to_one=draw(st.booleans()),
        final_sigmas_type=draw(st.sampled_from(["zero", "sigma_min"])),
        rule=rule,
    )


@st.composite
def schedules(draw, longest=12, **fixed):
    """A table of any configuration; those that ldm refuses, with a sentence, are left out."""
    config = draw(configs())
    n = draw(st.integers(1, min(longest, most_steps(config))))
    sigmas = draw(st.sampled_from([None, *CHOICES]))
    try:
        return config, sigmas, make_schedule(config, n, sigmas=sigmas, tokens=draw(st.integers(64, 8192)), **fixed)
    except LDMError:
        assume(False)


# ------------------------------------------------------------------------------------------------------ schedules


@examples(max_examples=300)
@given(schedules(longest=200))
def test_noise_falls_and_the_picture_grows_along_every_schedule(drawn):
    config, _, schedule = drawn
    flow = config.rule == "flow"
    for i, level in enumerate(schedule.levels):
        assert level.i == i and 0 <= level.alpha <= 1 and 0 <= level.sigma <= 1
        assert math.isclose(level.alpha + level.sigma if flow else math.hypot(level.alpha, level.sigma), 1)
        assert 0 <= level.t <= config.num_train_timesteps - (not flow)
    for a, b in pairwise(schedule.levels):
        assert b.alpha > a.alpha and b.sigma < a.sigma and b.ratio < a.ratio
    for a, b in pairwise(schedule.levels[:-1]):  # (the end's timestep is 0, and the network is never told it)
        assert b.t <= a.t
    assert schedule.start_scale in (1.0, schedule[0].sigma)


@examples(max_examples=300)
@given(schedules(longest=60))
def test_every_schedule_ends_where_its_rule_says(drawn):
    config, _, schedule = drawn
    ends = find_rule(config.rule).ends
    if ends == "file":
        clean = config.set_alpha_to_one if config.rule == "ddim" else config.final_sigmas_type == "zero"
        ends = "zero" if clean else "first"
    last, n = schedule.levels[-1], len(schedule)
    if ends == "zero":
        assert last == Level(n, 0.0, 1.0, 0.0)
    else:
        bar = float(alpha_bars(config)[0])
        assert last == Level(n, 0.0, math.sqrt(bar), math.sqrt(1 - bar))


@examples(max_examples=60)
@given(configs(), st.data())
def test_timestep_of_inverts_the_table_at_training_steps(config, data):
    assume(config.rule != "flow")
    bars = alpha_bars(config).double().numpy()
    t = data.draw(st.integers(0, len(bars) - 1))
    assume(bars[t] > 0 and (np.diff(bars) < 0).all())  # 2^-24 for zero SNR may lie above the step before
    assert math.isclose(timestep_of(math.sqrt((1 - bars[t]) / bars[t]), bars), t, abs_tol=1e-6)


@examples(max_examples=60)
@given(configs(), numbers(0, 1))
def test_timesteps_between_two_training_steps_are_in_order(config, where):
    """Between two steps the answer lies between them, on either kind of schedule; `between` keeps the ratio itself."""
    assume(config.rule != "flow" and not config.rescale_betas_zero_snr)
    bars = alpha_bars(config).double().numpy()
    low = int(where * (len(bars) - 2))
    assume(bars[low] > bars[low + 1] > 0)
    r = [math.sqrt((1 - bar) / bar) for bar in bars[low : low + 2]]
    ratio = math.sqrt(r[0] * r[1])
    assert low - 1e-6 < timestep_of(ratio, bars) < low + 1 + 1e-6
    assert math.isclose(timestep_of(ratio, bars), low + 0.5, abs_tol=1e-3)  # linear in the logarithm
    schedule = Schedule((Level(0, 1.0, 0.1, 0.99), Level(1, 0.0, 1.0, 0.0)), "epsilon", 1.0, "ddim", bars=bars)
    level = schedule.between(0, ratio)
    assert math.isclose(level.ratio, ratio) and math.isclose(math.hypot(level.alpha, level.sigma), 1)


# ------------------------------------------------------------------------------------------------------- samplers


@examples(max_examples=100)
@given(
    st.lists(numbers(-3, 3), min_size=1, max_size=4, unique=True),
    st.lists(numbers(-5, 5), min_size=4, max_size=4),
    numbers(0.3, 4),
)
def test_weights_average_polynomials_exactly(nodes, coefficients, end):
    """Those of as many coefficients as there are nodes; moments of any weight, here even from 0 to `end`."""
    assume(all(abs(a - b) > 0.05 for i, a in enumerate(nodes) for b in nodes[:i]))
    c = np.polynomial.Polynomial(coefficients[: len(nodes)])
    moments = [end**k / (k + 1) for k in range(len(nodes))]
    w = weights(nodes, moments)
    area = c.integ()
    assert math.isclose(
        sum(a * c(u) for a, u in zip(w, nodes, strict=True)), area(end) / end, rel_tol=1e-7, abs_tol=1e-7
    )


@st.composite
def three_levels(draw):
    """Of falling noise, on the circle or on flow's line; the last may be without noise, the first without picture."""
    angles = sorted(draw(st.lists(st.integers(0, 1000), min_size=3, max_size=3, unique=True)), reverse=True)
    flow, levels = draw(st.booleans()), []
    for i, k in enumerate(angles):
        sigma = k / 1000 if flow else math.sin(k / 1000 * math.pi / 2)
        levels.append(Level(i, float(k), 1 - sigma if flow else math.sqrt(1 - sigma**2), sigma))
    return levels, "flow" if flow else "v_prediction"


def full(value):
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


@examples(max_examples=150)
@given(three_levels(), st.sampled_from(sorted(FIRST_ORDER)), numbers(-3, 3), numbers(-3, 3))
def test_two_steps_along_a_frozen_prediction_are_one(drawn, name, x0, eps):
    """So first-order steps lose nothing to the number of rows, only to what the network changes its mind about."""
    levels, prediction = drawn
    x = add_noise(full(x0), full(eps), levels[0].alpha, levels[0].sigma)

    def go(rows):
        schedule = Schedule(tuple(row._replace(i=i) for i, row in enumerate(rows)), prediction, 1.0, "ddim")
        *_, last = sample(lambda x, level: Prediction(full(x0), full(eps)), x, schedule, FIRST_ORDER[name], Noise([]))
        return last.x

    twice = go(levels)
    torch.testing.assert_close(twice, go([levels[0], levels[2]]), rtol=0, atol=1e-11)
    expected = add_noise(full(x0), full(eps), levels[2].alpha, levels[2].sigma)
    torch.testing.assert_close(twice, expected, rtol=0, atol=1e-11)


@examples(max_examples=150)
@given(schedules(), st.sampled_from(sorted(name for name in ALL if name in SAMPLERS and not SAMPLERS[name].adds_noise)))
def test_a_frozen_prediction_is_a_straight_road_for_every_order(drawn, name):
    """Every curve through equal points is a constant: whatever its order, a method stays at alpha x0 + sigma eps."""
    _, _, schedule = drawn
    x0, eps = normal(1, 1, 2, 2, 3, dtype=torch.float64), normal(2, 1, 2, 2, 3, dtype=torch.float64)
    x = add_noise(x0, eps, schedule[0].alpha, schedule[0].sigma)
    for step in sample(lambda x, level: Prediction(x0, eps), x, schedule, ALL[name], Noise([])):
        expected = add_noise(x0, eps, step.next.alpha, step.next.sigma)
        # sigma / alpha may be 20,000 in the first row, and what is lost there in rounding is divided by alpha.
        torch.testing.assert_close(step.x, expected, rtol=0, atol=1e-8)


def mixing(x, level):
    """A linear network: neighbours mix, the more the noisier."""
    x0 = (0.2 + level.alpha) * (0.6 * x + level.sigma * 0.4 * x.roll(1, -1) - 0.1 * x.flip(1))
    return to_x0_eps(x0, x, level.alpha, level.sigma, "sample")


class Times(Noise):
    """Noise of another size."""

    def __init__(self, seeds, factor):
        super().__init__(Noise.from_seeds(seeds).generators)
        self.factor = factor

    def __call__(self, like):
        return self.factor * super().__call__(like)


def final(name, schedule, x, noise, denoise=mixing):
    *_, last = sample(denoise, x, schedule, ALL[name], noise)
    return last.x


@examples(max_examples=150)
@given(schedules(), every_sampler, numbers(-4, 4))
def test_with_a_linear_network_a_sampler_is_linear(drawn, name, factor):
    """In the first latent and the noise together: twice of both is twice the result, and sums go to sums."""
    _, _, schedule = drawn
    assume(abs(factor) > 0.01)
    x, y = normal(3, 2, 2, 3, 4, dtype=torch.float64), normal(4, 2, 2, 3, 4, dtype=torch.float64)
    one, other = final(name, schedule, x, Times([1, 2], 1.0)), final(name, schedule, y, Times([1, 2], factor))
    size = max(one.abs().max().item(), other.abs().max().item())
    assume(size < 1e6)  # PNDM's curve in time runs away where sigma / alpha is 4,000 in the first row
    assert size > 1e-3
    scaled = final(name, schedule, factor * x, Times([1, 2], factor))
    torch.testing.assert_close(scaled, factor * one, rtol=0, atol=1e-9 * size)
    both = final(name, schedule, x + y, Times([1, 2], 1 + factor))
    torch.testing.assert_close(both, one + other, rtol=0, atol=1e-9 * size)


@examples(max_examples=100)
@given(schedules(), every_sampler, st.permutations([0, 1, 2]))
def test_pictures_in_another_order_are_the_same_pictures(drawn, name, order):
    """Bit for bit, each with its own generator."""
    _, _, schedule = drawn
    x = normal(3, 3, 2, 2, 3)
    plain = final(name, schedule, x, Noise.from_seeds([1, 2, 3]), bent)
    moved = final(name, schedule, x[order], Noise.from_seeds([1 + k for k in order]), bent)
    assert plain.std() > 1e-3 and torch.equal(moved, plain[order])


def bent(x, level):
    """A network that is not linear."""
    return to_x0_eps(torch.tanh(x * (0.3 + level.alpha) + 0.3 * level.sigma), x, level.alpha, level.sigma, "sample")
