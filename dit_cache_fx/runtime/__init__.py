"""Steps, generations, branches and what is held for them."""
