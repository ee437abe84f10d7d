"""A judge for visual tokens: a vision model says of each word that a lens read whether it tells what a patch shows.

The protocol is that of LatentLens (arXiv 2602.00462), with a prompt of our own; docs/judge.md says what differs. Data pass from
`sampling` (readings → questions) through `judge` (questions → answers) to `judgments` (answers → shares).
"""
