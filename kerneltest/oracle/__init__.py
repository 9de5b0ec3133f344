"""The verdict: tensors in, comparison out. Knows no device and no process."""
