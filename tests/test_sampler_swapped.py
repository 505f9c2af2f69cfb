"""Under `compat` a swapped sampler runs as diffusers does after `from_config`: with what its class reads of the file.

Here on files that say what some classes read and others don't: chosen levels, zero terminal SNR, the end.
"""

import diffusers
import pytest
import torch
from reference import normal
from test_sampler_parity import SD, SHAPE, VARIANTS, error, quiet, run_diffusers, run_ours

from ldm.errors import LDMError
from ldm.schedules import ScheduleConfig, make_schedule
from ldm.schedules.config import CLASSES
from ldm.settings import choose_levels

V = {"prediction_type": "v_prediction"}
FILES = {
    "karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "timestep_spacing": "leading"}),
    "beta": ("EulerDiscreteScheduler", {"use_beta_sigmas": True, "steps_offset": 1}),
    "zero snr": ("DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **V}),
    "silent about its end": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1, **V}),
    "to the first level": ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1}),
}
TARGETS = (
    "ddpm", "ddim", "plms", "euler", "euler-a", "heun", "lms", "dpm2", "dpm2-a", "dpm++2m", "dpm++3m", "dpm++2m-sde",
    "dpm++2s", "deis2", "unipc2", "lcm", "tcd",
)  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("file", FILES)
def test_a_swapped_sampler_reads_the_file_as_its_class_does(file, target):
    cls, fields = FILES[file]
    saved = getattr(diffusers, cls)(**SD, **fields)
    with quiet(torch.float32):
        scheduler = getattr(diffusers, VARIANTS[target][0]).from_config(saved.config, **VARIANTS[target][1])
        scheduler.set_timesteps(10)
    config = ScheduleConfig.from_json({"_class_name": cls, **SD, **fields})
    schedule = choose_levels(config, steps=10, sampler=VARIANTS[target][2], compat=True).schedule(config)
    x = normal(3, *SHAPE)
    with quiet(torch.float32):
        theirs = run_diffusers(scheduler, 10, x)
    assert schedule.rule == CLASSES[VARIANTS[target][0]][0]
    assert max(map(error, run_ours(target, schedule, x), theirs)) < 3e-5


def test_without_compat_a_swapped_sampler_keeps_the_schedule():
    for cls, fields in FILES.values():
        config = ScheduleConfig.from_json({"_class_name": cls, **SD, **fields})
        own = choose_levels(config, steps=10).schedule(config)
        for target in TARGETS:
            assert choose_levels(config, steps=10, sampler=VARIANTS[target][2]).schedule(config) == own


def test_only_ddim_and_pndm_go_by_their_stride():
    """diffusers has no other class that does, whatever the rule."""
    config = ScheduleConfig(**SD, timestep_spacing="trailing")
    for sampler in ("ddim", "plms", "pndm", "heun", "dpm++2m"):
        schedule = choose_levels(config, steps=7, sampler=sampler, rule="ddim", compat=True).schedule(config)
        assert (schedule.landings is not None) == (sampler in ("ddim", "plms", "pndm"))


@pytest.mark.parametrize("name", ["plms", "pndm", "lms"])
def test_compat_begins_at_alpha_0_with_a_step_of_first_order(name):
    """The rows of diffusers' own class never stand there; those of a zero terminal SNR file or of flow do."""
    zero = {**SD, **V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for config, rule in ((ScheduleConfig(**zero), "ddim"), (ScheduleConfig(prediction_type="flow", rule="flow"), None)):
        schedule = make_schedule(config, 6, rule, compat=True)
        assert schedule[0].alpha == 0
        ours = run_ours(name, schedule, normal(3, *SHAPE, dtype=torch.float64))
        assert all(x.isfinite().all() and x.std() > 0.1 for x in ours)


def test_levels_above_what_training_knew_are_refused():
    config = ScheduleConfig(**SD)
    with pytest.raises(LDMError, match=r"begin at 100: training ended at 14\.61"):
        choose_levels(config, sigmas=[100.0, 5.0, 1.0, 0.0]).schedule(config)
    assert len(choose_levels(config, sigmas=[14.615, 5.0, 1.0, 0.0]).schedule(config)) == 3
