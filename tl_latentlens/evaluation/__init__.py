"""Is the lens right? Figures without a judge."""
