"""Results as people look at them; the plain data that views draw are in `data` and `grids`.

`terminal` has tables (rich), `notebook` has HTML for notebooks. `heatmap`, `curves` and `followed` have figures (plotly).
`page`, `image` and `features` have self-contained HTML files; `image` has pictures (Pillow) too.
"""
