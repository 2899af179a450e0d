"""Reading and writing scheduler_config.json, and refusing settings that contradict each other."""

from typing import Any

import pytest
from pydantic import ValidationError

from cvx_core import FormatError, Registry
from cvx_plugins.schedulers.scheduler_config import DDIMConfig, DPMConfig

# As the released CogVideoX-2b pipeline has it.
RELEASED = {
    "_class_name": "CogVideoXDDIMScheduler",
    "_diffusers_version": "0.30.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "snr_shift_scale": 3.0,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}


def test_released_config_is_read() -> None:
    fields = DDIMConfig.recognise(RELEASED)
    assert fields is not None
    assert fields.pop("use") == "ddim"
    assert DDIMConfig(**fields) == DDIMConfig(snr_shift=3.0)


def test_each_sampler_reads_its_own_class_only() -> None:
    assert DPMConfig.recognise(RELEASED) is None
    assert DDIMConfig.recognise({"_class_name": "EulerDiscreteScheduler"}) is None
    assert DDIMConfig.recognise({}) is None
    fields = DPMConfig.recognise({**RELEASED, "_class_name": "CogVideoXDPMScheduler"})
    assert fields is not None
    assert fields["use"] == "dpm"


def test_absent_keys_mean_what_diffusers_assumes() -> None:
    fields = DDIMConfig.recognise({"_class_name": "CogVideoXDDIMScheduler"})
    assert fields == {
        "use": "ddim",
        "snr_shift": 3.0,
        "prediction": "epsilon",
        "zero_snr": False,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "spacing": "leading",
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_train_timesteps", 500),
        ("beta_schedule", "linear"),
        ("trained_betas", [0.1, 0.2]),
        ("set_alpha_to_one", False),
        ("steps_offset", 1),
        ("prediction_type", "sample"),
        ("thresholding", True),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(FormatError, match=key):
        DDIMConfig.recognise({**RELEASED, key: value})


@pytest.mark.parametrize(
    "config",
    [
        DDIMConfig(),
        DDIMConfig(snr_shift=3.0, spacing="linspace"),
        DDIMConfig(prediction="epsilon", zero_snr=False, beta_end=0.02),
        DPMConfig(snr_shift=2.5, spacing="leading"),
    ],
)
def test_description_is_recognised(config: DDIMConfig | DPMConfig) -> None:
    fields = type(config).recognise(config.describe())
    assert fields is not None
    assert fields.pop("use") == config.foreign_use
    assert type(config)(**fields) == config


def test_description_builds_the_foreign_scheduler() -> None:
    diffusers = pytest.importorskip("diffusers")
    for config in (DDIMConfig(snr_shift=3.0), DPMConfig()):
        made = getattr(diffusers, config.foreign_class).from_config(config.describe())
        assert made.config.snr_shift_scale == config.snr_shift
        assert made.alphas_cumprod[-1] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prediction": "epsilon"}, "zero_snr: false"),
        ({"flavour": "sat", "spacing": "leading"}, "flavour: diffusers"),
        ({"flavour": "sat", "zero_snr": False}, "flavour: diffusers"),
        ({"beta_start": 0.5}, "swap"),
        ({"groups": 7}, "does not divide"),
        ({"snr_shift": 0.0}, "greater than 0"),
        ({"draw": "intervl"}, "'uniform' or 'interval'"),
    ],
)
def test_contradicting_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DDIMConfig(**fields)


def test_manifest_names_both_samplers() -> None:
    registry = Registry.discover()
    for name in ("ddim", "dpm"):
        component = registry.get("scheduler", name)
        assert component.config is not None
        assert component.config().foreign_use == name
