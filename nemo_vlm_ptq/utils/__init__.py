"""Model-independent utilities: prefetching, pinned-memory copies, progress bars."""
