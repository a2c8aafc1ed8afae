"""What pyproject.toml cannot say: the device code in kernels/ is installed as initperf.kernels, never as a top-level `kernels`."""

from setuptools import find_packages, setup

KERNELS = [f"initperf.{name}" for name in find_packages(include=["kernels", "kernels.*"])]

setup(
    packages=sorted({*find_packages(include=["initperf", "initperf.*"]), *KERNELS}),
    package_dir={"initperf.kernels": "kernels"},
)
