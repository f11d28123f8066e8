"""Sliders and menus for a function that a cell has already called.

Notebook: 01_sound_to_spectrogram
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable

from IPython.utils.capture import capture_output
from ipywidgets import Output, VBox, Widget
from ipywidgets.widgets.interaction import show_inline_matplotlib_plots


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
    """
    inspect.signature(function).bind(**controls)
    output = Output()

    def refresh(_change: object = None) -> None:
        values = {name: control.value for name, control in controls.items()}
        output.outputs = cell_outputs(lambda: function(**values))

    for name, control in controls.items():
        control.description = control.description or name.replace("_", " ")
        if control.has_trait("continuous_update"):
            control.continuous_update = False  # redraw when the slider is released
        control.observe(refresh, names="value")
    refresh()
    return VBox([*controls.values(), output])


def cell_outputs(call: Callable[[], object]) -> tuple[dict, ...]:
    """Everything that a call prints, shows and raises, in the form of a cell's outputs.

    It is collected and returned at once. `with Output():` would make the front end send every
    output back to the kernel while the cell runs, and nbclient, under papermill, may then miss the
    end of the cell and wait for ever.
    """
    error = []
    with capture_output() as shown:
        try:
            call()
            show_inline_matplotlib_plots()
        except Exception as raised:
            lines = traceback.format_exception(raised)
            about = {"ename": type(raised).__name__, "evalue": str(raised), "traceback": lines}
            error = [{"output_type": "error", **about}]
    streams = [
        {"output_type": "stream", "name": name, "text": text}
        for name, text in (("stdout", shown.stdout), ("stderr", shown.stderr))
        if text
    ]
    pictures = [
        {"output_type": "display_data", "data": o.data, "metadata": o.metadata or {}}
        for o in shown.outputs
    ]
    return (*streams, *pictures, *error)
