"""Integrations with other programs; import each module by its own name."""
