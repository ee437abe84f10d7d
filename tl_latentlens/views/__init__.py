"""What people look at: `terminal` tables (rich), `heatmap` (plotly), `page` (a file of its own), `html` for notebooks."""
