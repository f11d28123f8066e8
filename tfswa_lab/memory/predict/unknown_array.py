"""Arrays of numpy whose numbers nobody knows.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tfswa_lab.memory.predict.unknown import Truth, Unknown, asking_frame, line_of

FINITE = {np.isfinite: True, np.isnan: False, np.isinf: False}


class UnknownArray(np.ndarray):
    """Of NaN: it has a shape, and can be averaged, copied and logged.

    What chooses by its numbers, as `argmax` does, is refused.
    """

    values: Any = None  # a `Values`

    def __array_finalize__(self, parent: Any) -> None:
        self.values = getattr(parent, "values", None)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        plain = [np.asarray(x).view(np.ndarray) for x in inputs]
        if ufunc in FINITE and method == "__call__":
            return np.full(plain[0].shape, FINITE[ufunc])
        options.pop("out", None)
        found = getattr(ufunc, method)(*plain, **options)
        return self._wrapped(found)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if function in CHOOSING:
            raise self._refusal()
        found = super().__array_function__(function, types, args, kwargs)
        return self._wrapped(found)

    def _wrapped(self, found: Any) -> Any:
        line = line_of(asking_frame())
        if np.ndim(found) == 0 and not isinstance(found, tuple):
            is_truth = np.asarray(found).dtype == bool
            return Truth(self.values, line) if is_truth else Unknown(self.values, line)
        if not isinstance(found, np.ndarray):
            return found
        found = found.view(UnknownArray)
        found.values = self.values
        return found

    def _refusal(self) -> Exception:
        return self.values.refuse("a choice by the numbers of an array", line_of(asking_frame()))

    def _refused(self, *_: Any, **__: Any) -> Any:
        raise self._refusal()

    def __bool__(self) -> bool:
        return self.values.decide() if self.size == 1 else super().__bool__()

    def item(self, *_: Any) -> Unknown:
        """One of its numbers."""
        return Unknown(self.values, line_of(asking_frame()))

    def astype(self, dtype: Any, *rest: Any, **options: Any) -> np.ndarray:
        """Other floats; NaN is no whole number."""
        if not np.issubdtype(dtype, np.floating):
            raise self._refusal()
        return super().astype(dtype, *rest, **options)

    argmax = argmin = argsort = argpartition = nonzero = searchsorted = __int__ = _refused


CHOOSING = {
    *(np.argmax, np.argmin, np.argsort, np.argpartition, np.nonzero, np.argwhere, np.unique),
    *(np.flatnonzero, np.count_nonzero, np.searchsorted, np.histogram, np.bincount, np.digitize),
}
