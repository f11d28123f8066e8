"""Running lean: the memory of a program while it runs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"monitor": ["Monitor"]})
