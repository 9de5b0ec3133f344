"""Reports: they listen, and write what they heard. Nothing here decides anything."""
