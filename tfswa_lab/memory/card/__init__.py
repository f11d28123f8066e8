"""What a CUDA card would do, told without one: kernels, autocast, the allocator."""
