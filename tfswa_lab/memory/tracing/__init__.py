"""Blocks of memory, when they are made and freed, by which line and which module."""
