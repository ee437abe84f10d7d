"""What people look at: `terminal` tables (rich), `heatmap` (plotly), `html` for notebooks."""
