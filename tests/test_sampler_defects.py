"""Where diffusers' samplers depart from their methods or break: each entry of REFERENCE_DEFECTS.md from 7 on, seen.

Also what entry 1 costs. When one of these fails after an upgrade, diffusers has mended something, and the entry goes.
"""

import diffusers
import pytest
import torch
from reference import in_float64, normal
from test_sampler_parity import (
    SD,
    SHAPE,
    config_of,
    error,
    make,
    network,
    quiet,
    run_diffusers,
    run_ours,
)
from test_samplers import gaussian, gaussian_solution

from ldm.diffusion import Prediction, to_x0_eps
from ldm.errors import LDMError
from ldm.noise import Noise
from ldm.samplers import SAMPLERS
from ldm.samplers.onestep import ddim
from ldm.sampling import sample
from ldm.schedules import ScheduleConfig, make_schedule
from ldm.schedules.table import timestep_of

X = normal(3, *SHAPE, dtype=torch.float64)


def runs(name, n, **fields):
    """The last latents of diffusers, of ours under compat, and of the method."""
    scheduler = make(name, n, **fields)
    config = config_of(scheduler)
    with quiet():
        theirs = run_diffusers(scheduler, n, X)[-1]
    return theirs, *(run_ours(name, make_schedule(config, n, compat=compat), X)[-1] for compat in (True, False))


@pytest.mark.parametrize("spacing, compat, method", [("linspace", 0.059, 0.085), ("trailing", 0.089, 0.097)])
def test_what_ddim_s_wrong_previous_timestep_costs(spacing, compat, method):
    """The figures under REFERENCE_DEFECTS.md's table: on Gaussian data diffusers comes out nearer to the solution."""
    x = torch.linspace(-2, 2, 64, dtype=torch.float64).view(1, 1, 8, 8)
    for n, wanted in ((30, (compat, method)), (500, (0, 0))):
        off = []
        for truth in (True, False):
            schedule = make_schedule(ScheduleConfig(**SD, timestep_spacing=spacing), n, compat=truth)
            *_, last = sample(gaussian, x, schedule, ddim, Noise([]))
            solution = gaussian_solution(x, schedule[0], schedule[n])
            assert solution.abs().max() > 1
            off.append((last.x - solution).abs().max().item())
        assert off == pytest.approx(wanted, abs=0.0005 if n == 30 else 0.009)  # both vanish with many steps
        assert n == 500 or off[0] < off[1]  # where n divides 1000, `trailing` has nothing to mistake


@pytest.mark.parametrize(
    "name, number, n, least, most",
    [
        ("dpm++3m", 7, 20, 0.01, 0.02),
        ("dpm++3m", 7, 50, 0.001, 0.005),
        ("dpm3m", 7, 20, 0.005, 0.01),
        ("dpm++3m-sde", 8, 20, 0.2, 0.4),
        ("dpm++3m-sde", 8, 50, 0.2, 0.4),
    ],
)
def test_defect_the_third_order_bends_its_parabola_half_as_much_or_the_wrong_way(name, number, n, least, most):
    """7 and 8. That it is the reference that is wrong, the orders of convergence say (test_samplers.py)."""
    theirs, compat, method = runs(name, n)
    assert error(compat, theirs) < 1e-10
    assert least < error(method, theirs) < most


# ------------------------------------------------------------------------------------------------------- 9: PNDM


@pytest.mark.parametrize("n, least", [(7, 0.01), (30, 0.01)])
def test_defect_pndm_goes_by_its_stride_wherever_the_next_row_is(n, least):
    theirs, compat, method = runs("plms", n, timestep_spacing="trailing")
    assert error(compat, theirs) < 1e-10 and error(method, theirs) > least
    # Where rows lie a stride apart, there is nothing to tell.
    theirs, _, method = runs("plms", n, timestep_spacing="leading", steps_offset=1)
    assert error(method, theirs) < 1e-10


@pytest.mark.parametrize("name", ["plms", "pndm"])
def test_defect_pndm_averages_what_the_network_says_and_not_eps(name):
    """One network, told in eps or in v, should draw one picture: with diffusers' PNDM it doesn't."""
    finals = {}
    for prediction in ("epsilon", "v_prediction"):
        scheduler = make(name, 20, prediction_type=prediction, steps_offset=1)
        bars, schedule = scheduler.alphas_cumprod, make_schedule(config_of(scheduler), 20)

        def said(x, alpha, sigma, t, prediction=prediction):
            eps = torch.tanh(x) * (t + 300) / (t + 500)
            return eps if prediction == "epsilon" else (eps - sigma * x) / alpha  # v of the same eps

        x, (alpha, sigma) = X, (bars.sqrt(), (1 - bars).sqrt())
        for t in scheduler.timesteps:
            x = scheduler.step(said(x, alpha[t], sigma[t], t.item()), t, x).prev_sample

        def denoise(x, level, schedule=schedule, said=said):
            out = said(x, level.alpha, level.sigma, level.t)
            return to_x0_eps(out, x, level.alpha, level.sigma, schedule.prediction)

        *_, last = sample(denoise, X, schedule, SAMPLERS[name].step, Noise([]))
        finals[prediction] = x, last.x
    theirs, ours = (list(pair) for pair in zip(*finals.values(), strict=True))
    assert error(*ours) < 1e-10 and error(*theirs) > 0.005
    assert error(ours[0], theirs[0]) < 1e-10  # in eps they agree


@pytest.mark.parametrize("n", [1, 2, 3])
def test_defect_runge_kutta_needs_four_rows(n):
    with pytest.raises(ValueError, match="broadcast"):
        diffusers.PNDMScheduler(**SD).set_timesteps(n)
    schedule = make_schedule(config_of(diffusers.PNDMScheduler(**SD, steps_offset=1)), n)
    assert run_ours("pndm", schedule, X)[-1].isfinite().all()


def test_defect_pndm_begun_in_the_middle_skips_a_level():
    """With eps = 0 a picture only grows as alpha does: by how much tells the levels that were visited."""
    scheduler = make("plms", 10, steps_offset=1)
    x = X
    for t in scheduler.timesteps[5:]:
        x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
    schedule = make_schedule(config_of(scheduler), 10)
    expected = X * schedule[10].alpha / schedule[4].alpha  # timesteps[5] is row 4: row 1 comes twice
    assert schedule[4].t == scheduler.timesteps[5] and error(x, expected) > 0.05
    lost = schedule[6].alpha / schedule[5].alpha
    assert error(x * lost, expected) < 1e-10

    def denoise(x, level):
        return Prediction(x / level.alpha, torch.zeros_like(x))

    *_, last = sample(denoise, X, schedule, SAMPLERS["plms"].step, Noise([]), first=4)
    assert error(last.x, expected) < 1e-10


# --------------------------------------------------------------------------------------------- 10 to 15: the tables


@pytest.mark.parametrize("cls", ["DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep"])
def test_defect_fractions_of_timesteps_are_cut(cls):
    """10. The second level lies at 874.74, and the network is told 874; the first at 999, and it is told 998."""
    for choice in ("exponential", "beta"):
        scheduler = getattr(diffusers, f"{cls}Scheduler")(**SD, **{f"use_{choice}_sigmas": True})
        with quiet(torch.float32):
            scheduler.set_timesteps(10)
        schedule = make_schedule(config_of(scheduler), 10, compat=True)
        exact = torch.tensor([timestep_of(level.ratio, schedule.bars) for level in schedule.levels[:-1]])
        behind = exact - scheduler.timesteps
        assert [level.t for level in schedule.levels[:-1]] == scheduler.timesteps.tolist()
        assert scheduler.timesteps.dtype == torch.int64 and 0.6 < behind.max() < 1.001
        assert choice == "beta" or (scheduler.timesteps[:2].tolist() == [998, 874] and abs(exact[1] - 874.74) < 0.01)
        if cls != "DEISMultistep":  # whose table ends twice: by default refused
            ours = torch.tensor([level.t for level in make_schedule(config_of(scheduler), 10).levels[:-1]])
            assert torch.equal(ours, exact.round())


@pytest.mark.parametrize("choice", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("name", ["dpm++3m to sigma_min", "unipc3 to sigma_min", "deis3"])
def test_defect_tables_with_chosen_levels_end_twice_on_one(name, choice):
    """11. The last step has no length; third order DPM-Solver divides by it."""
    scheduler = make(name, 20, **{f"use_{choice}_sigmas": True})
    assert torch.isclose(scheduler.sigmas[-1], scheduler.sigmas[-2], rtol=1e-9)
    with quiet():
        theirs = run_diffusers(scheduler, 20, X)[-1]
    assert theirs.isnan().all() == (name == "dpm++3m to sigma_min")
    with pytest.raises(LDMError, match=r"Rows 19 and 20 .* same noise level"):
        make_schedule(config_of(scheduler), 20)
    compat = run_ours(name, make_schedule(config_of(scheduler), 20, compat=True), X)
    assert compat[-1].isfinite().all()
    assert name.startswith("unipc") or error(compat[-1], compat[-2]) < 1e-9  # UniPC still corrects the step before


@pytest.mark.parametrize("order", [1, 2, 3])
def test_defect_unipc_bh1_to_zero_is_nan(order):
    """12. B(h) = h is infinite there, and is multiplied by 0."""
    scheduler = in_float64(diffusers.UniPCMultistepScheduler)(**SD, solver_type="bh1", solver_order=order)
    scheduler.set_timesteps(10)
    with quiet():
        theirs = run_diffusers(scheduler, 10, X)
    assert theirs[-1].isnan().all() and theirs[-2].isfinite().all()
    for compat in (True, False):
        ours = run_ours(f"unipc{order} to sigma_min, bh1", make_schedule(config_of(scheduler), 10, compat=compat), X)
        assert error(ours[-2], theirs[-2]) < 1e-6 and ours[-1].isfinite().all()


def test_defect_lms_begun_in_the_middle_loses_part_of_its_step():
    """13. Coefficients of four predictions, of which only the first exist: with eps constant the way is known."""
    scheduler = make("lms", 10)
    schedule = make_schedule(config_of(scheduler), 10)
    scheduler.set_begin_index(4)
    eps, x = torch.ones_like(X), X
    for t in scheduler.timesteps[4:]:
        scheduler.is_scale_input_called = True
        x = scheduler.step(eps, t, x).prev_sample
    expected = X + (schedule[10].ratio - schedule[4].ratio) * eps
    assert error(x, expected) > 0.05

    def denoise(x, level):
        return Prediction((x - level.sigma) / level.alpha, torch.ones_like(x))

    *_, last = sample(denoise, X * schedule[4].alpha, schedule, SAMPLERS["lms"].step, Noise([]), first=4)
    assert error(last.x, expected) < 1e-10


def test_defect_singlestep_changes_its_own_configuration():
    """14. What is saved after a run is another file than before; to us both mean the same."""
    scheduler = diffusers.DPMSolverSinglestepScheduler(**SD)
    before = scheduler.config.lower_order_final
    config = config_of(scheduler)
    with quiet(torch.float32):
        scheduler.set_timesteps(10)
    assert (before, scheduler.config.lower_order_final) == (False, True)
    assert config_of(scheduler) == config


@pytest.mark.parametrize("cls", ["UniPCMultistep", "DEISMultistep", "DPMSolverSinglestep"])
def test_defect_two_rows_told_the_same_timestep_lose_the_first(cls):
    """15. A run looks its first row up by its timestep, takes the second row of that name, and falls off the end."""
    fields = {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}
    scheduler = getattr(diffusers, f"{cls}Scheduler")(**fields)
    with quiet(torch.float32):
        scheduler.set_timesteps(20)
        assert scheduler.timesteps[0] == scheduler.timesteps[1]
        x = X.float()
        with pytest.raises(AssertionError if cls == "UniPCMultistep" else IndexError):
            for t in scheduler.timesteps:
                x = scheduler.step(network(x, t.item()), t, x).prev_sample
    schedule = make_schedule(config_of(scheduler), 20, compat=True)
    name = {"UniPCMultistep": "unipc2", "DEISMultistep": "deis2", "DPMSolverSinglestep": "dpm++2s"}[cls]
    assert len(run_ours(name, schedule, X)) == 21
