"""The README's examples run as they stand."""

import re
import subprocess
import sys
from pathlib import Path


def test_examples_run_one_after_another(tmp_path):
    readme = Path(__file__).parents[1] / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert len(blocks) == 2
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "torch.Size([4, 32]) torch.Size([4, 32])" in result.stdout
