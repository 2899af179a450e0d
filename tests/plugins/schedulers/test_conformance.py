"""Both samplers, in every flavour, against the conformance kit."""

from cvx_core.testing import Suite, scheduler

VARIANTS = {
    "ddim": scheduler.suite("ddim"),
    "ddim-shifted": scheduler.suite("ddim", snr_shift=3.0, draw="interval"),
    "ddim-sat": scheduler.suite("ddim", flavour="sat"),
    "ddim-epsilon": scheduler.suite("ddim", prediction="epsilon", zero_snr=False),
    "ddim-linspace": scheduler.suite("ddim", spacing="linspace"),
    "dpm": scheduler.suite("dpm"),
    "dpm-ode": scheduler.suite("dpm", solver="ode"),
    "dpm-sat": scheduler.suite("dpm", flavour="sat", snr_shift=3.0),
    "dpm-sat-ode": scheduler.suite("dpm", flavour="sat", solver="ode"),
    "dpm-leading": scheduler.suite("dpm", spacing="leading"),
}
# Like diffusers, a step goes down by 1000 // steps, which is not the stride of 'linspace'.
OFF_THE_GRID = ("ddim-linspace", "every_step_lands_on_the_next_noise_level")

test_scheduler = Suite(
    {
        f"{variant}.{name}": check
        for variant, suite in VARIANTS.items()
        for name, check in ((key.partition(".")[2], check) for key, check in suite.checks.items())
        if (variant, name) != OFF_THE_GRID
    }
)
