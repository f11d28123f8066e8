"""Running lean: what a program takes while it runs."""
