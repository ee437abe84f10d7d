"""Steering vectors: making one, adding it to a run, reading what it changes."""
