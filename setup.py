"""Build of initperf: one pure-Python wheel. The device code in kernels/ is installed as initperf.kernels, never as a top-level `kernels`."""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "initperf/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="initperf",
    version=VERSION,
    description="Weight initialization, lottery tickets and layer variance for PyTorch: fast, and the same bits everywhere",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[
        "initperf",
        "initperf.core",
        "initperf.experiments",
        "initperf.data",
        "initperf.reference",
        "initperf.kernels",
        "initperf.kernels.cpu",
        "initperf.kernels.gpu",
    ],
    package_dir={"initperf.kernels": "kernels"},
    package_data={"initperf": ["py.typed"], "initperf.data": ["*.gz", "*.md"]},
    install_requires=[
        "torch==2.13.*",
        "numpy>=1.26",
        "numba>=0.61",
        'triton>=3.4; platform_system == "Linux"',
        "safetensors>=0.4",
        "matplotlib>=3.8",
        "rich>=13",
        "typer>=0.12",
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3",
            "hypothesis>=6",
            "scipy>=1.11",
            "transformers==5.24.*",
            "tensorboard>=2.21",
            "lightning>=2.6",
            "accelerate>=1.15",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "build>=1",
        ],
    },
    entry_points={"console_scripts": ["initperf = initperf.cli:main"]},
)
