"""The part of the build that a table cannot say: all packages, and configs/ as one of them."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["nemo_vlm_ptq", "nemo_vlm_ptq.*"]), "nemo_vlm_ptq.configs"],
    package_dir={"nemo_vlm_ptq.configs": "configs"},
)
