import re
from pathlib import Path


def test_the_examples_run(tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for block in blocks:
        exec(block, names)
    assert (tmp_path / "run/global_step1/COMMIT").is_file()
    assert len(blocks) == 4
