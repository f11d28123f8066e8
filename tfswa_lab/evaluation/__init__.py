"""From a model to scores over whole songs."""
