"""The program that every pass reads and writes, and what goes with it."""
