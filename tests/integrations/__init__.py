"""What other programs call this package through."""
