"""Widgets call the function with their values, and hide no mistake."""

import pytest
from ipywidgets import IntSlider, Text

from tfswa_lab.teaching.widgets import explore


def test_the_function_follows_the_controls():
    seen = []
    box = explore(
        lambda n_fft, stem: seen.append((n_fft, stem)), n_fft=IntSlider(3), stem=Text("x")
    )
    box.children[0].value = 5
    assert seen == [(3, "x"), (5, "x")]
    assert [control.description for control in box.children[:2]] == ["n fft", "stem"]
    assert box.children[0].continuous_update is False


def test_own_descriptions_stay():
    box = explore(lambda n: None, n=IntSlider(description="window"))
    assert box.children[0].description == "window"


def test_a_control_that_the_function_does_not_take_is_an_error():
    with pytest.raises(TypeError, match="n_fft"):
        explore(lambda n_fft: None, n_ftt=IntSlider())


def test_an_error_is_shown_below_the_controls():
    box = explore(lambda n: 1 / n, n=IntSlider(0))
    (error,) = box.children[-1].outputs
    assert (error["output_type"], error["ename"]) == ("error", "ZeroDivisionError")
    box.children[0].value = 2
    assert box.children[-1].outputs == ()


def test_what_is_printed_is_shown():
    box = explore(lambda n: print(n), n=IntSlider(3))
    assert box.children[-1].outputs == ({"output_type": "stream", "name": "stdout", "text": "3\n"},)
