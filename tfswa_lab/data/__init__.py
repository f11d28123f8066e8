"""Tracks, stems and the embedded band."""
