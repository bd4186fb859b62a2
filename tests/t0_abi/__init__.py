"""t0: the shape of things: formats, constants, imports, documents."""
