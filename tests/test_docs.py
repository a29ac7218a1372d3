"""Every public name has a docstring that names its arguments; every module and public class says what it is."""

import importlib
import inspect
import pkgutil

import pytest

import lamkernels

# modules that import what not every machine has
OPTIONAL = ("triton", "cuda")
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(lamkernels.__path__, "lamkernels.")
    if not any(part in module.name for part in OPTIONAL) and not module.name.startswith("lamkernels.bench")
)
PUBLIC = sorted(set(lamkernels.__all__) - {"__version__", "compat", "lam"})


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_their_public_names_have_docstrings(name):
    module = importlib.import_module(name)
    for public, item in vars(module).items():
        own = getattr(item, "__module__", None) == name
        if not public.startswith("_") and own and (inspect.isfunction(item) or inspect.isclass(item)):
            assert inspect.getdoc(item), f"{name}.{public}"


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_surface_names_every_argument(name):
    item = getattr(lamkernels, name)
    text = inspect.getdoc(item) or ""
    assert text
    arguments = inspect.signature(item).parameters
    for argument in arguments:
        assert argument in text, f"{name}: {argument}"
    if inspect.isfunction(item) and arguments:
        assert "Returns:" in text or "->" in text
        assert "Raises:" in text
