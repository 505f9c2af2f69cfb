"""`scheduler_config.json`: what it says of a schedule, which sampler it means, and what is refused.

diffusers' scheduler classes turn one and the same configuration into different tables: other timesteps, roundings and
ends. Each such way is a `Rule`; several classes share one. A file names its class, and with it rule and sampler.
"""

import math
import reprlib
from dataclasses import dataclass, fields, replace
from typing import get_args

from ldm.config import from_json
from ldm.diffusion import PREDICTIONS
from ldm.errors import LDMError, nearest

SPACINGS = ("leading", "linspace", "trailing")
CHOICES = ("spaced", "karras", "exponential", "beta", "ays", "ays-xl", "even")  # ways to choose the levels of noise


@dataclass(frozen=True)
class Rule:
    """How a family of diffusers' classes makes its table."""

    spacing: str = "leading"  # where the file has none
    extra: bool = False  # lays n + 1 points over the timesteps and leaves out the last, which stands for the clean end
    fractions: bool = False  # timesteps may lie between two training steps
    ends: str = "file"  # its last level: as the `file` says, always at `zero`, or on the `first` training level
    whole_range: bool = False  # chosen levels span the training's range, and not that of the spaced table
    told: str = "exact"  # the timestep told for a chosen level: `exact`, rounded for `karras`, or always `whole`
    scaled: bool = False  # spacings that reach the noisiest step begin from sigma * eps, and not from eps
    nearly_zero: bool = (
        True  # at zero terminal SNR the noisiest level has alpha^2 = 2^-24, so that it can be divided by
    )


RULES = {
    "ddpm": Rule(ends="zero", nearly_zero=False),
    "ddim": Rule(nearly_zero=False),
    "euler": Rule("linspace", fractions=True, scaled=True),
    "heun": Rule("linspace", fractions=True, scaled=True, ends="zero"),
    "dpm2": Rule("linspace", fractions=True, scaled=True, ends="zero", told="karras"),
    "dpm": Rule("linspace", extra=True, whole_range=True, told="whole"),
    "singlestep": Rule("linspace", extra=True, whole_range=True, told="whole"),
    "deis": Rule("linspace", extra=True, whole_range=True, told="whole", ends="first"),
    "unipc": Rule("linspace", extra=True, whole_range=True, told="whole"),
    "lcm": Rule(ends="zero", nearly_zero=False),
    "tcd": Rule(ends="first", nearly_zero=False),
    "flow": Rule(ends="zero"),
}


def find_rule(name: str) -> Rule:
    """The rule of that name. Raises LDMError that names the nearest one."""
    if not isinstance(name, str) or name not in RULES:
        raise LDMError(f"Unknown schedule rule {name!r}: ldm knows {', '.join(RULES)}.{nearest(str(name), RULES)}")
    return RULES[name]


@dataclass(frozen=True)
class ScheduleConfig:
    """The fields of `scheduler_config.json` that shape the table. Defaults are diffusers'."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None  # instead of the three above
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str | None = None
    steps_offset: int = 0
    original_inference_steps: int = 50  # lcm, tcd: the steps of the teacher, among which theirs are chosen
    set_alpha_to_one: bool | None = None  # unsaid is true, but for PNDM
    final_sigmas_type: str = "zero"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float | None = None  # the ends of the chosen levels, as sigma / alpha
    sigma_max: float | None = None
    shift: float = 1.0  # flow: this and what follows
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    clip_sample: bool | None = None  # a habit of pixel models; latents are not clipped, nor does diffusers' pipeline
    rule: str = "ddim"
    sampler: str = "ddim"  # the one that the file's class is

    @property
    def spacing(self) -> str:
        """The file's spacing, or the one its class takes where the file is silent."""
        if self.rule == "singlestep":  # whatever the file says: its class doesn't read the field
            return "linspace"
        return self.timestep_spacing or find_rule(self.rule).spacing

    @property
    def sigmas(self) -> str:
        """Which of `CHOICES` the file makes."""
        asked = [name for name in ("karras", "exponential", "beta") if getattr(self, f"use_{name}_sigmas")]
        if len(asked) > 1:
            raise LDMError(f"The scheduler file asks for {' and '.join(asked)} sigmas: only one of them can be.")
        return asked[0] if asked else "spaced"

    @classmethod
    def from_json(cls, fields: dict) -> "ScheduleConfig":
        """Read diffusers' JSON; a field that is neither implemented nor neutral is refused by name."""
        name = fields.get("_class_name", "DDIMScheduler")
        if not isinstance(name, str) or name not in CLASSES:
            raise LDMError(
                f"The scheduler file names {name!r}; ldm knows {', '.join(CLASSES)}.{nearest(str(name), CLASSES)}"
            )
        rule, _, silent = CLASSES[name]
        # null: what the class does when told nothing
        fields = silent | {k: v for k, v in fields.items() if v is not None}
        check_kinds(fields)
        sampler = sampler_of(name, fields)
        neutral = NEUTRAL | {k: v for k, v in fields.items() if k in CHOOSES_SAMPLER}
        config = replace(from_json(cls, fields, neutral, "the scheduler"), rule=rule, sampler=sampler)
        config.check(name)
        return config

    def check(self, name: str) -> None:
        """Refuse values that no table can be made of."""
        if self.prediction_type not in PREDICTIONS:
            raise LDMError(
                f"The scheduler file has prediction_type {self.prediction_type!r}, unknown to ldm: "
                f"it knows {', '.join(PREDICTIONS)}."
            )
        if self.final_sigmas_type not in ("zero", "sigma_min"):
            raise LDMError(f"The scheduler file has final_sigmas_type {self.final_sigmas_type!r}, unknown to ldm.")
        if self.time_shift_type not in ("exponential", "linear"):
            raise LDMError(f"The scheduler file has time_shift_type {self.time_shift_type!r}, unknown to ldm.")
        if self.trained_betas is not None and len(self.trained_betas) < self.num_train_timesteps:
            raise LDMError(
                f"The scheduler file has {len(self.trained_betas)} trained_betas for {self.num_train_timesteps} "
                "num_train_timesteps: each training step needs one."
            )
        if self.use_dynamic_shifting and self.max_image_seq_len <= self.base_image_seq_len:
            raise LDMError(
                f"The scheduler file has max_image_seq_len {self.max_image_seq_len}: it must be above "
                f"base_image_seq_len, {self.base_image_seq_len}."
            )
        choice = self.sigmas
        if name in WITHOUT_CHOICE and choice != "spaced":
            raise LDMError(f"The scheduler file asks for {choice} sigmas, which {name} doesn't read.")
        if name in WITHOUT_ZERO_SNR and self.rescale_betas_zero_snr:
            raise LDMError(f"The scheduler file asks for rescale_betas_zero_snr, which {name} doesn't read.")
        if name != "FlowMatchEulerDiscreteScheduler" and (self.use_dynamic_shifting or self.shift_terminal is not None):
            raise LDMError(
                f"The scheduler file shifts its levels (use_dynamic_shifting, shift_terminal): not {name}'s."
            )


SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"prediction_type": "flow"}
CLASSES: dict[str, tuple[str, str | None, dict]] = {
    # the class that a file names: its rule, its sampler (None: `sampler_of`), what it takes where the file is silent
    "DDPMScheduler": ("ddpm", "ddpm", {}),
    "DDIMScheduler": ("ddim", "ddim", {}),
    "PNDMScheduler": ("ddim", None, {"set_alpha_to_one": False}),
    "EulerDiscreteScheduler": ("euler", "euler", {}),
    "EulerAncestralDiscreteScheduler": ("heun", "euler-a", {}),
    "HeunDiscreteScheduler": ("heun", "heun", SD_BETAS),
    "LMSDiscreteScheduler": ("heun", "lms", {}),
    "KDPM2DiscreteScheduler": ("dpm2", "dpm2", SD_BETAS),
    "KDPM2AncestralDiscreteScheduler": ("dpm2", "dpm2-a", SD_BETAS),
    "DPMSolverMultistepScheduler": ("dpm", None, {}),
    "DPMSolverSinglestepScheduler": ("singlestep", None, {}),
    "DEISMultistepScheduler": ("deis", None, {}),
    "UniPCMultistepScheduler": ("unipc", None, {}),
    "LCMScheduler": ("lcm", "lcm", SD_BETAS | {"beta_schedule": "scaled_linear"}),
    "TCDScheduler": ("tcd", "tcd", SD_BETAS | {"beta_schedule": "scaled_linear"}),
    "FlowMatchEulerDiscreteScheduler": ("flow", "euler", FLOW),
    "FlowMatchHeunDiscreteScheduler": ("flow", "flow-heun", FLOW),
}
WITHOUT_CHOICE = (
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler",
    "TCDScheduler", "FlowMatchHeunDiscreteScheduler",
)  # fmt: skip
WITHOUT_ZERO_SNR = (
    "PNDMScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler",
)  # fmt: skip

CHOOSES_SAMPLER = {
    "skip_prk_steps": bool, "algorithm_type": str, "solver_order": int, "solver_type": str, "lower_order_final": bool,
}  # fmt: skip
RANGES = {  # of whole numbers the least and the most; others lie between the two
    "num_train_timesteps": (2, 10**6),
    "steps_offset": (0, 10**6),
    "original_inference_steps": (1, 10**6),
    "solver_order": (0, 99),  # which of them there are says `sampler_of`
    "beta_start": (0, 1),
    "beta_end": (0, 1),
    "trained_betas": (0, 1),
    "sigma_min": (0, 1e6),
    "sigma_max": (0, 1e6),
    "shift": (0, 1e6),
    "base_shift": (-100, 100),
    "max_shift": (-100, 100),
    "base_image_seq_len": (1, 10**9),
    "max_image_seq_len": (1, 10**9),
    "shift_terminal": (0, 1),
}


def check_kinds(file: dict) -> None:
    """Refuse a field that holds something else than its kind of value, or a number out of its range."""
    kinds = {f.name: (get_args(f.type) or (f.type,))[0] for f in fields(ScheduleConfig)} | CHOOSES_SAMPLER
    for name in (name for name in file if name in kinds):
        value, kind, (low, high) = file[name], kinds[name], RANGES.get(name, (0, 0))

        def between(x: object, low: float = low, high: float = high) -> bool:
            return isinstance(x, int | float) and not isinstance(x, bool) and low < x < high

        right, words = {
            bool: (isinstance(value, bool), "true or false"),
            str: (isinstance(value, str), "a word"),
            int: (isinstance(value, int) and between(value, low - 1, high + 1), f"a whole number, {low} to {high}"),
            float: (between(value), f"a number above {low:g} and below {high:g}"),
        }.get(kind) or (
            isinstance(value, list | tuple) and all(map(between, value)),
            f"a list of numbers above {low:g} and below {high:g}",
        )
        if not right:
            raise LDMError(f"The scheduler file has {name} {reprlib.repr(value)}: it must be {words}.")


SOLVERS = {  # (class, algorithm_type, solver_order) -> sampler; without noise, the first order of all is DDIM's step
    ("DPMSolverMultistepScheduler", "dpmsolver++", 1): "ddim",
    ("DPMSolverMultistepScheduler", "dpmsolver++", 2): "dpm++2m",
    ("DPMSolverMultistepScheduler", "dpmsolver++", 3): "dpm++3m",
    ("DPMSolverMultistepScheduler", "sde-dpmsolver++", 1): "euler-a",
    ("DPMSolverMultistepScheduler", "sde-dpmsolver++", 2): "dpm++2m-sde",
    ("DPMSolverMultistepScheduler", "sde-dpmsolver++", 3): "dpm++3m-sde",
    ("DPMSolverMultistepScheduler", "dpmsolver", 1): "ddim",
    ("DPMSolverMultistepScheduler", "dpmsolver", 2): "dpm2m",
    ("DPMSolverMultistepScheduler", "dpmsolver", 3): "dpm3m",
    ("DPMSolverSinglestepScheduler", "dpmsolver++", 1): "ddim",
    ("DPMSolverSinglestepScheduler", "dpmsolver++", 2): "dpm++2s",
    ("DEISMultistepScheduler", "deis", 1): "ddim",
    ("DEISMultistepScheduler", "deis", 2): "deis2",
    ("DEISMultistepScheduler", "deis", 3): "deis3",
    ("UniPCMultistepScheduler", None, 1): "unipc1",
    ("UniPCMultistepScheduler", None, 2): "unipc2",
    ("UniPCMultistepScheduler", None, 3): "unipc3",
}
ALGORITHM = {  # what each class takes where the file is silent
    "DPMSolverMultistepScheduler": "dpmsolver++",
    "DPMSolverSinglestepScheduler": "dpmsolver++",
    "DEISMultistepScheduler": "deis",
    "UniPCMultistepScheduler": None,
}
# One class's file carries the words of another after `from_config`; diffusers reads those as its own default, and so
# do we. solver_type: what ldm has of the class, its default last, and the words of others.
FOREIGN_ALGORITHM = {
    "DPMSolverMultistepScheduler": ("deis",),
    "DPMSolverSinglestepScheduler": ("deis",),
    "DEISMultistepScheduler": ("dpmsolver", "dpmsolver++"),
    "UniPCMultistepScheduler": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++", "deis"),
}
SOLVER_TYPES = {
    "DPMSolverMultistepScheduler": (("midpoint",), ("logrho", "bh1", "bh2")),
    "DPMSolverSinglestepScheduler": (("midpoint",), ("logrho", "bh1", "bh2")),
    "DEISMultistepScheduler": (("logrho",), ("midpoint", "heun", "bh1", "bh2")),
    "UniPCMultistepScheduler": (("bh1", "bh2"), ("midpoint", "heun", "logrho")),
}


def sampler_of(name: str, fields: dict) -> str:
    """The sampler that a file means. Raises LDMError, by name, for a variant that ldm doesn't have."""
    if CLASSES[name][1] is not None:
        return CLASSES[name][1]
    if name == "PNDMScheduler":
        return "plms" if fields.get("skip_prk_steps", False) else "pndm"
    own, foreign = SOLVER_TYPES[name]
    kind = fields.get("solver_type", own[-1])
    kind = own[-1] if kind in foreign else kind
    algorithm = fields.get("algorithm_type", ALGORITHM[name])
    algorithm = ALGORITHM[name] if algorithm in FOREIGN_ALGORITHM.get(name, ()) else algorithm
    asked = (name, algorithm, fields.get("solver_order", 2))
    if kind not in own or asked not in SOLVERS:
        known = ", ".join(f"{algorithm} of order {order}" for cls, algorithm, order in SOLVERS if cls == name)
        raise LDMError(
            f"The scheduler file says solver_type {kind!r}, algorithm_type {algorithm!r}, solver_order {asked[2]!r}; "
            f"ldm's {name} has solver_type {' and '.join(own)}; {known}."
        )
    singlestep = name == "DPMSolverSinglestepScheduler"
    idle = singlestep and fields.get("final_sigmas_type", "zero") == "zero"  # there diffusers sets it to true itself
    if not fields.get("lower_order_final", not singlestep) and not idle:
        raise LDMError("The scheduler file asks for 'lower_order_final' = False; ldm implements only True.")
    return SOLVERS[asked] + ("-bh1" if kind == "bh1" else "")


NEUTRAL = {  # fields of the JSON that we accept at these values alone: with them they change nothing
    "clip_sample_range": 1.0,
    "disable_corrector": (),
    "dynamic_thresholding_ratio": 0.995,  # read only with thresholding
    "euler_at_final": False,
    "flow_shift": 1.0,
    "interpolation_type": "linear",
    "invert_sigmas": False,
    "lambda_min_clipped": -math.inf,
    "predict_x0": True,
    "sample_max_value": 1.0,
    "solver_p": None,
    "stochastic_sampling": False,
    "thresholding": False,
    "timestep_scaling": 10.0,
    "timestep_type": "discrete",
    "use_flow_sigmas": False,
    "use_lu_lambdas": False,
    "variance_type": "fixed_small",
}


def as_read_for(sampler: str, config: ScheduleConfig) -> ScheduleConfig:
    """The file as diffusers' class of that sampler reads it (`from_config`): what the class doesn't know is dropped."""
    sampler = sampler.removesuffix("-bh1")
    owners = [name for name, (_, own, _) in CLASSES.items() if own == sampler]
    owners += [name for (name, _, _), own in SOLVERS.items() if own == sampler]
    name = owners[0] if owners else "PNDMScheduler"
    dropped = {}
    if name in WITHOUT_CHOICE:
        dropped = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
    if name in WITHOUT_ZERO_SNR:
        dropped["rescale_betas_zero_snr"] = False
    if name == "PNDMScheduler" and config.set_alpha_to_one is None:
        dropped["set_alpha_to_one"] = False
    return replace(config, rule=CLASSES[name][0], **dropped)
