"""What the benchmark of evidence says about memory."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.mark.slow
def test_the_growth_of_a_process_is_its_own(tmp_path: Path) -> None:
    """Its parent has had much more memory than it ever takes."""
    script = tmp_path / "measure.py"
    script.write_text(
        textwrap.dedent(f"""
            import sys
            from pathlib import Path
            sys.path[:0] = {[str(BENCHMARKS), str(BENCHMARKS.parent)]!r}
            import numpy as np
            import evidence

            def fills_100_mib(*_):
                return np.ones(100 << 17)[:1]

            if __name__ == "__main__":
                np.ones(1000 << 17)
                evidence.write_features(Path("features"), 10)
                print(evidence.peak_rss_mib(), evidence.apart(fills_100_mib, "nothing", Path("features"), {{}}).growth)
        """)
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    parent, growth = map(float, done.stdout.split()[-2:])
    assert parent > 1000
    assert 95 < growth < 150
