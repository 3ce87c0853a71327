"""Find the session, branch, generation and step of a call."""
