"""t3: real memory, sockets, threads and processes, but no mount."""
