"""t4: real FUSE mounts."""
