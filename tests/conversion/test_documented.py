"""The commands and the Python in docs/formats.md work, in the order in which they stand there."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from cvx_core import cli

PAGE = Path(__file__).resolve().parents[2] / "docs/formats.md"


@pytest.fixture
def workplace(shared, tmp_path, monkeypatch):
    """A folder with small stand-ins for what the page names."""
    sat = shared / "fixtures/sat"
    shutil.copytree(sat / "t2v_5b/transformer", tmp_path / "CogVideoX-5b-sat/transformer")
    (tmp_path / "CogVideoX-5b-sat/vae").mkdir()
    shutil.copy(sat / "vae/3d-vae.pt", tmp_path / "CogVideoX-5b-sat/vae/3d-vae.pt")
    shutil.copytree(sat / "lora/transformer", tmp_path / "finetune/transformer")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_can_be_followed(workplace, capsys):
    text = PAGE.read_text()
    for line in re.findall(r"```sh\n(.*?)```", text, re.S)[0].splitlines():
        small = line.replace("[10,11,11,10]", "[1,1]").replace("tp=2", "tp=3")  # two layers, three heads
        words = shlex.split(small)
        assert words[0] == "cvx"
        assert cli.main(words[1:]) == 0, (line, capsys.readouterr().err)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(compile(code, "formats.md", "exec"), {})
    assert Path("sat/conversion.json").exists()
