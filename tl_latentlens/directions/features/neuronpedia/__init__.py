"""Labelled features for Neuronpedia: its bulk files, and batches through its API.

`records` has what both hold, `names` checks ids, `files` writes the files, `upload` sends the batches. The schema is that of
Neuronpedia's own code of August 2026: the route `upload-batch` of its web app, and the `db_models` of its utilities.
"""
