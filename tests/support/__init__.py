"""What several tests need: models, banks, oracles, processes, pages."""
