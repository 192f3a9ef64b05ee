"""The README's examples run as they stand."""

import re
from pathlib import Path


def test_examples_run_one_after_another(tmp_path, monkeypatch, capsys):
    readme = Path(__file__).parents[1] / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for block in blocks:
        exec(block, names)
    assert "torch.Size([4, 32]) torch.Size([4, 32])" in capsys.readouterr().out
