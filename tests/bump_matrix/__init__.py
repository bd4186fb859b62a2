"""The rows of `docs/spec/bump-matrix.md`, as read from the document, as FUSE requests and as system calls of a guest."""
