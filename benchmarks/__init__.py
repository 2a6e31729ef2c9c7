"""Timings beside the alternatives; results with their environment in `results/`."""
