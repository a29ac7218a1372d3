"""Maps csrc/ and bench/ into the package; everything else is in pyproject.toml."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Leaves the benchmark's own tests out of the wheel."""

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [entry for entry in found if not entry[1].startswith("test_")]


setup(
    packages=[
        *find_packages(include=["lamkernels", "lamkernels.*"]),
        "lamkernels.csrc",
        "lamkernels.bench",
        "lamkernels.bench.stock",
    ],
    package_dir={"lamkernels.csrc": "csrc", "lamkernels.bench": "bench", "lamkernels.bench.stock": "bench/stock"},
    package_data={"lamkernels": ["py.typed"], "lamkernels.csrc": ["*"]},
    cmdclass={"build_py": BuildPy},
)
