"""The embedded corpus, its labels, the embedded model, and how it was trained."""
