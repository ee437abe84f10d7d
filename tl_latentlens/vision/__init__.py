"""Visual tokens: patch grids, keys and values, the judge, scenes."""
