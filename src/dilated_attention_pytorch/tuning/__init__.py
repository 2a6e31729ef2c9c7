"""From problems to measurements: what compiles, what is right, what is fast."""
