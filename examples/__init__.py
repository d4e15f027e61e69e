"""Code to copy, and the demo that drives it."""
