"""Where memory goes: traces, snapshots, predictions without a GPU, and the causes of leaks."""
