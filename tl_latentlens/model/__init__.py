"""All that the package asks of a TransformerLens model, both classes alike."""
