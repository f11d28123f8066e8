"""What a prediction cannot see, said for the operators that occurred.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Patterns of the names of operators, and what goes with them.
UNSEEN = {
    r"mm|bmm|addmm|baddbmm": "cuBLAS workspace: 8.1 MiB by default, 32 MiB on Hopper; in allocated",
    r".*convolution.*": "cuDNN workspaces of convolutions: they depend on shapes and algorithms, "
    "up to gigabytes with cudnn.benchmark; in allocated while they run",
    r"_fft.*": "cuFFT: workspaces in allocated while they run, plans outside of it",
    r".*(lstm|gru|rnn).*": "cuDNN's reserve of recurrent layers; in allocated",
}
ALWAYS = (
    "temporaries inside operators that never become tensors",
    "the CUDA context and loaded kernels, hundreds of MiB: on the card, outside of the allocator",
)


def error_budget(operators: Iterable[str]) -> tuple[str, ...]:
    """A sentence for everything that is not in the numbers.

    Args:
        operators: names such as `aten.mm.default`.

    Notebook: 05_where_memory_goes

    >>> error_budget(["aten.mm.default"])[0]
    'cuBLAS workspace: 8.1 MiB by default, 32 MiB on Hopper; in allocated'
    """
    names = {operator.removeprefix("aten.").split(".")[0] for operator in operators}
    found = [
        text for pattern, text in UNSEEN.items() if any(map(re.compile(pattern).fullmatch, names))
    ]
    return (*found, *ALWAYS)
