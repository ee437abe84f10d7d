"""Exact nearest neighbors over tensors; knows nothing of models or files."""

from tl_latentlens.search.vectors import TopK, VectorSearch

__all__ = ["TopK", "VectorSearch"]
