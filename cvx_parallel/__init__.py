"""Mechanisms for running on many devices; plain arguments, no recipe types."""
