"""Figures, players, widgets and checks of the lessons, and their runner."""
