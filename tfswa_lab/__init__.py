"""tfswa_lab: from sound to stems, and where the memory goes on the way.

A room is a sub-package and the notebooks that teach it. Importing the package imports no room,
so a broken dependency of one never closes another.

Notebook: 00_start_here
"""

__version__ = "0.1.0"
