"""Mechanisms for files, names and video; plain arguments, no recipe types."""
