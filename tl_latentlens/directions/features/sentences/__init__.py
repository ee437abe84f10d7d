"""A sentence for a feature, written by a language model from what is known, and scored on contexts that nobody has seen.

`drawn_contexts` draws the contexts, `questions` writes what is asked and reads what comes back, `describe` asks and scores.
"""
