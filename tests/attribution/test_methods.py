"""The table of attribution methods holds everything that depends on the method; no other code compares their names."""

import ast
import inspect
from pathlib import Path

import rmtension
from rmtension import NeuronAttribution
from rmtension.attribution._methods import METHODS

PACKAGE = Path(rmtension.__file__).parent


def compared_names(source):
    """Names of methods that a comparison or a match in some code looks for."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare | ast.MatchValue):
            names |= {
                constant.value
                for constant in ast.walk(node)
                if isinstance(constant, ast.Constant) and constant.value in METHODS
            }
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("startswith", "endswith", "removeprefix"):
            names |= {
                constant.value
                for constant in node.args
                if isinstance(constant, ast.Constant) and constant.value in METHODS
            }
    return names


def test_no_code_compares_names_of_methods():
    for path in sorted(PACKAGE.rglob("*.py")):
        assert compared_names(path.read_text()) == set(), path.name


def test_comparisons_with_names_are_detected():
    assert compared_names('x = method == "direct_effect"') == {"direct_effect"}
    assert compared_names('x = method in ("integrated_gradients", "y")') == {"integrated_gradients"}
    assert compared_names('x = name.startswith("attribution_patching")') == {"attribution_patching"}
    assert compared_names('x = {"direct_effect": 1}') == set()


def test_every_method_is_under_its_name():
    assert all(name == method.name for name, method in METHODS.items())


def test_costs_are_those_that_the_docstring_states():
    text = " ".join(inspect.cleandoc(NeuronAttribution.__doc__).split())
    for method in METHODS.values():
        for cost in method.cost.split("; with GradDrop, "):
            assert f" {cost}" in text, method.name
