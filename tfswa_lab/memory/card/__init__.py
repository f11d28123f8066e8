"""What a CUDA card would do, told without one: kernels, autocast, rounding, the allocator."""
