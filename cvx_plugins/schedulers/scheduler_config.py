"""Fields of the schedulers, and their translation from and to `scheduler_config.json`. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cvx_core import Config, FormatError
from cvx_core.config import Positive

TRAIN_STEPS = 1000

PREDICTIONS = {"v": "v_prediction", "epsilon": "epsilon"}

# What diffusers assumes where a scheduler_config.json is silent.
FOREIGN_DEFAULTS: Mapping[str, Any] = {
    "num_train_timesteps": TRAIN_STEPS,
    "beta_start": 0.00085,
    "beta_end": 0.0120,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
    "snr_shift_scale": 3.0,
}
# The only value we can honour for keys that have no field here.
FIXED = ("num_train_timesteps", "beta_schedule", "trained_betas", "set_alpha_to_one", "steps_offset")
# Keys the foreign samplers carry but never read: any value means the same.
UNREAD = ("clip_sample", "clip_sample_range", "sample_max_value")


class SchedulerConfig(Config):
    """What every scheduler shares: the noise schedule, the training draw and the sampling times."""

    foreign_class: ClassVar[str] = ""
    foreign_use: ClassVar[str] = ""
    unspoken: ClassVar[tuple[str, ...]] = ("flavour", "draw", "groups", "guidance_exponent")
    """Fields that the foreign file has no key for; its library skips keys that begin with an underscore."""

    snr_shift: Annotated[float, Field(gt=0.0)] = 1.0
    """Divide the signal-to-noise ratio of every timestep by this: above 1 noisier, 1 as the betas give it."""
    prediction: Literal["v", "epsilon"] = "v"
    """What the predictor's output stands for."""
    zero_snr: bool = True
    """Rescale so that timestep 999 is pure noise."""
    beta_start: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.00085
    """First beta; their square roots are spaced evenly."""
    beta_end: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.012
    """Last beta."""
    flavour: Literal["diffusers", "sat"] = "diffusers"
    """Whose sampling to reproduce: they differ in timesteps, in the rescaled table and in rounding."""
    spacing: Literal["trailing", "linspace", "leading"] = "trailing"
    """How sampling timesteps are spread over the training ones."""
    draw: Literal["uniform", "interval"] = "uniform"
    """Training timesteps of a data rank: from the whole range, or from the slice of the rank's group."""
    groups: Positive | None = None
    """Number of slices of `draw: interval`; None: the largest divisor of the rank count that divides 1000."""
    guidance_exponent: Annotated[int, Field(ge=1)] = 5
    """Exponent of the dynamic guidance weight."""

    @model_validator(mode="after")
    def _is_consistent(self) -> SchedulerConfig:
        if self.beta_end < self.beta_start:
            raise ValueError(f"beta_end {self.beta_end} is below beta_start {self.beta_start}; swap them.")
        if self.prediction == "epsilon" and self.zero_snr:
            raise ValueError(
                "prediction 'epsilon' says nothing about the latent at timestep 999 of a zero terminal SNR; "
                "set zero_snr: false, or prediction: v."
            )
        if self.flavour == "sat" and not (
            self.prediction == "v" and self.zero_snr and self.spacing == "trailing"
        ):
            raise ValueError(
                "flavour 'sat' is defined for prediction 'v', zero_snr true and spacing 'trailing' only; "
                f"got {self.prediction!r}, {self.zero_snr} and {self.spacing!r}. Use flavour: diffusers."
            )
        if self.groups is not None and TRAIN_STEPS % self.groups:
            raise ValueError(
                f"groups {self.groups} does not divide the {TRAIN_STEPS} timesteps; use e.g. 8, 10 or 40."
            )
        return self

    @classmethod
    def recognise(cls, foreign: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return recipe fields for a `scheduler_config.json`, or None where it is of another class.

        Raises FormatError for a key or value that has no counterpart here.
        """
        if foreign.get("_class_name") != cls.foreign_class:
            return None
        given = {
            key: value for key, value in foreign.items() if not key.startswith("_") and key not in UNREAD
        }
        for key, value in given.items():
            if key not in FOREIGN_DEFAULTS:
                raise FormatError(
                    f"scheduler_config.json: key {key!r} ({value!r}) is unknown to {cls.foreign_use!r}."
                )
            if key in FIXED and value != FOREIGN_DEFAULTS[key]:
                raise FormatError(
                    f"scheduler_config.json: {key} is {value!r}; scheduler {cls.foreign_use!r} supports "
                    f"{FOREIGN_DEFAULTS[key]!r} only."
                )
        values = {**FOREIGN_DEFAULTS, **given}
        predictions = {foreign_name: name for name, foreign_name in PREDICTIONS.items()}
        if values["prediction_type"] not in predictions:
            raise FormatError(
                f"scheduler_config.json: prediction_type is {values['prediction_type']!r}; "
                f"scheduler {cls.foreign_use!r} supports {' or '.join(map(repr, predictions))}."
            )
        return {
            "use": cls.foreign_use,
            "snr_shift": values["snr_shift_scale"],
            "prediction": predictions[values["prediction_type"]],
            "zero_snr": values["rescale_betas_zero_snr"],
            "beta_start": values["beta_start"],
            "beta_end": values["beta_end"],
            "spacing": values["timestep_spacing"],
            **foreign.get("_cvx", {}),
        }

    def describe(self) -> dict[str, Any]:
        """Return the `scheduler_config.json` that `recognise` would turn into this noise schedule."""
        return {
            "_class_name": self.foreign_class,
            **{key: FOREIGN_DEFAULTS[key] for key in FIXED},
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "clip_sample": False,
            "prediction_type": PREDICTIONS[self.prediction],
            "rescale_betas_zero_snr": self.zero_snr,
            "snr_shift_scale": self.snr_shift,
            "timestep_spacing": self.spacing,
            "_cvx": {name: getattr(self, name) for name in self.unspoken},
        }


class DDIMConfig(SchedulerConfig):
    """The deterministic first-order sampler has no fields of its own."""

    foreign_class: ClassVar[str] = "CogVideoXDDIMScheduler"
    foreign_use: ClassVar[str] = "ddim"


class DPMConfig(SchedulerConfig):
    """DPM-Solver++ (2M)."""

    foreign_class: ClassVar[str] = "CogVideoXDPMScheduler"
    foreign_use: ClassVar[str] = "dpm"
    unspoken: ClassVar[tuple[str, ...]] = (*SchedulerConfig.unspoken, "solver")

    solver: Literal["sde", "ode"] = "sde"
    """Stochastic (fresh noise at every step) or deterministic."""
