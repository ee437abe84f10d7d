"""The hooks: `record` fills a bank, `decode` reads with one, `names` says which activations."""
