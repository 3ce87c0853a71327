"""What other programs need to use this package; each module is imported by its own name only."""
