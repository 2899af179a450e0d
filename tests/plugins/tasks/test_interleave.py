"""Encoding ahead: the same run, batch for batch, resumed where the work was, not where it looked ahead."""

import pytest
import torch

from cvx_core.interfaces import Parts, Work
from cvx_plugins.parallel.interleave import Interleave
from cvx_plugins.parallel.interleave_config import InterleaveConfig


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}], ids=["plain", "accumulate"])
def test_a_run_is_the_same_and_resumes_in_the_middle_of_a_round(tiny, launch, options, tmp_path):
    tiny["task"] |= {"steps": 12, **options}
    plain = launch(tiny, output=str(tmp_path / "plain"))
    tiny["parallel"] = [{"use": "interleave", "rounds": 4}]
    ahead = launch(tiny, output=str(tmp_path / "ahead"))
    launch(tiny, output=str(tmp_path / "parts"), **{"task.stop_at": 6})
    parts = launch(tiny, output=str(tmp_path / "parts"), **{"task.resume": "auto"})
    log = (plain / "log.jsonl").read_bytes()
    assert (ahead / "log.jsonl").read_bytes() == log
    assert (parts / "log.jsonl").read_bytes() == log


@pytest.mark.parametrize("offload", [True, False])
def test_encoders_are_on_the_device_while_they_encode_only(offload):
    """The meta device stands for an accelerator."""
    seen = []
    text_encoder, autoencoder = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    def where():
        return [module.weight.device.type for module in (text_encoder, autoencoder)]

    def encode(works):
        for work in works:
            seen.append(("encode", work.cursor, *where()))
            yield work

    parts = Parts(device="meta", text_encoder=text_encoder, autoencoder=autoencoder, encode=encode)
    for module in (text_encoder, autoencoder):
        module.to("meta")
        module.to = lambda device, module=module: _pretend(module, device)
    parts = Interleave(InterleaveConfig(rounds=2, offload=offload), None).apply(parts)
    for work in parts.encode(Work(i, None, None) for i in range(3)):
        seen.append(("step", work.cursor, *where()))
    away = "cpu" if offload else "meta"
    assert [row[:2] for row in seen] == [
        ("encode", 0),
        ("encode", 1),
        ("step", 0),
        ("step", 1),
        ("encode", 2),
        ("step", 2),
    ]
    assert all(row[2:] == (("meta",) * 2 if row[0] == "encode" else (away,) * 2) for row in seen)


def _pretend(module, device):
    """Move a module there and back without its values, which meta tensors do not have."""
    module.weight = torch.nn.Parameter(torch.empty(2, 2, device=device))
    return module
