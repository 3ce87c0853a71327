"""Which session, branch, generation and step a call belongs to."""
