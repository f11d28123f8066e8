"""The networks and their blocks, plain PyTorch."""
