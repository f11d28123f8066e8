"""Turn a function that a cell has already called into something to play with.

Notebook: 01_sound_to_spectrogram
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from ipywidgets import VBox, Widget, interactive_output


def explore(function: Callable[..., object], **controls: Widget) -> VBox:
    """Controls above, the live output of `function(**values)` below.

    Call the function once in a normal cell first: that figure is there for readers without a
    kernel. An error in the function appears as a traceback below the controls, and the test that
    executes the lessons looks for it there.

    Args:
        function: draws, prints or displays; takes one argument per control.
        controls: ipywidgets, by argument name; those without a description get that name.

    Raises:
        TypeError: the function does not take these arguments.

    Notebook: 01_sound_to_spectrogram
    """
    inspect.signature(function).bind(**controls)
    for name, control in controls.items():
        control.description = control.description or name.replace("_", " ")
        if control.has_trait("continuous_update"):
            control.continuous_update = False  # redraw when the slider is let go, not on the way
    return VBox([*controls.values(), interactive_output(function, controls)])
