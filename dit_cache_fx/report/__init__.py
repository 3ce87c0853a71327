"""What a user can ask of a cache: reports, explanations, pictures."""
