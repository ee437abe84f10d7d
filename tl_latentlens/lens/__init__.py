"""The lens hooks, the logit and embedding lens, and their results."""
