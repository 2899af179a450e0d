"""Side-by-side measurements against diffusers; run `python -m benchmarks --help`."""
