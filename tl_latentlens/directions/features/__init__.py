"""SAE features: their activity over a bank, labels, and the scores that say which labels to believe."""
