"""Means and shares with intervals."""
