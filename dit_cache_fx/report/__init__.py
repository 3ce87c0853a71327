"""Reports, explanations and plots of a cache."""
