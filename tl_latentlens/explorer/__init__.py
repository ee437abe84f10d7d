"""The local page that `tl-latentlens explore` serves."""
