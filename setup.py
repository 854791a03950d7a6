"""Packaging of dncbm. `sparse_autoencoder/` is a package of its own: install it first (README.md)."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
requirements = [
    line.strip()
    for line in (here / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.startswith("#")
]

setup(
    name="dncbm",
    version="1.0.0",
    description="Discover-then-Name concept bottlenecks: from any CLIP-like image encoder to an interpretable classifier.",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["dncbm", "dncbm.*"]),
    package_data={"dncbm": ["py.typed", "data/*.json", "browser/site/*"]},
    install_requires=requirements,
)
