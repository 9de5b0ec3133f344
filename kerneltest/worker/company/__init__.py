"""Launch sequences on the device: the steps, the launch in their midst, and what comes of it."""
