"""Maps csrc/ and bench/ into the package; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["lamkernels", "lamkernels.*"]), "lamkernels.csrc", "lamkernels.bench"],
    package_dir={"lamkernels.csrc": "csrc", "lamkernels.bench": "bench"},
    package_data={"lamkernels": ["py.typed"], "lamkernels.csrc": ["*"]},
)
