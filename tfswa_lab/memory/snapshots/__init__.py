"""Snapshots of CUDA's allocator: recording, reading without trust, what they say."""
