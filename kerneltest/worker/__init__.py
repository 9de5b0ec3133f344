"""The GPU's side of the wall: one process that holds the device, launches and judges."""
