"""t5: real virtual machines."""
