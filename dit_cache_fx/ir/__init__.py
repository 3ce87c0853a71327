"""`Program`, the graph that every pass reads and writes, and helpers for its nodes."""
