import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "sparse_autoencoder" / "README.md"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    exec(example, {})
    assert "explained_variance" in capsys.readouterr().out
    assert (tmp_path / "sae.safetensors").exists()
