"""Benchmarks, side by side against peers: `python -m benchmarks`, from the root of the repository."""
