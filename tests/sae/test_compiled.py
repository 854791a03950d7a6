"""The compiler's cache, and what importing the package costs."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numba
import pytest
from numba.core import caching

from sparse_autoencoder.compiled import compiled


def double(x: int) -> int:
    return 2 * x


def test_the_cache_is_beside_the_source_as_numba_has_it() -> None:
    before = numba.config.CACHE_DIR
    assert compiled()(double)(4) == 8
    assert before == numba.config.CACHE_DIR


@pytest.mark.parametrize("already_there", ["nothing", "a folder of others", "a link", "a file"])
def test_without_a_place_it_is_a_folder_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, already_there: str
) -> None:
    """numba runs what it finds in its cache: nobody else may be able to write there."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache = caching.CacheImpl if hasattr(caching, "CacheImpl") else caching._CacheImpl  # in older versions
    only = [one for one in cache._locator_classes if "UserProvided" in one.__name__]
    monkeypatch.setattr(cache, "_locator_classes", only)  # a read-only installation without a home
    usual = tmp_path / f"numba-{os.getuid()}"
    if already_there == "a folder of others":
        usual.mkdir()
        usual.chmod(0o777)
    elif already_there == "a link":
        usual.symlink_to(tmp_path)
    elif already_there == "a file":
        usual.write_text("")
    assert compiled()(double)(4) == 8
    folder = Path(numba.config.CACHE_DIR)
    assert folder.parent == tmp_path
    assert (folder == usual) == (already_there == "nothing")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.rglob("*.nbi"))


def test_settings_and_variants_need_neither_torch_nor_numba() -> None:
    """`--help` lists them."""
    code = (
        "import sys; from sparse_autoencoder import VARIANTS, TrainingSettings; from sparse_autoencoder.declare import flags;"
    )
    code += "assert len([flags(one) for one in VARIANTS.values()]) == 5 and 'lr' in flags(TrainingSettings);"
    code += "print([name for name in ('torch', 'numba', 'scipy', 'matplotlib') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_everything_public_is_found() -> None:
    import sparse_autoencoder

    for name in sparse_autoencoder.__all__:
        assert getattr(sparse_autoencoder, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sparse_autoencoder.nonsense
