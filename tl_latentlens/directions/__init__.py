"""Vectors that are no activations: SAE features, steering vectors, differences of means."""
