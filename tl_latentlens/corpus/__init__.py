"""Texts of a corpus, and the plan: which tokens become rows, before the model runs."""
