"""Tests of the workshop; they render small templates of their own."""
