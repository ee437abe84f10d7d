"""Exact nearest neighbors over tensors; knows nothing of models or files.

A coarse pass scores every row in low precision; its error has a proven bound. A row whose score plus bound is below the k-th
best similarity known so far is dropped. The remaining rows, the candidates, are scored again in float32 and then in float64.
So the neighbors do not depend on the device, the precision of the coarse pass or the chunk size, and ties go to the lower row.

Queries pass once, from the top of this picture to the bottom, one step a file. `VectorSearch` (`vectors`) is the dispatcher: it
places the rows (`rows`), chooses the coarse pass (`coarse_pass`), and calls `driver.top_k_of_parts`, which owns the loop over
chunks and ranks several searches together::

    vectors         VectorSearch: .top_k(queries, k)
       │
    queries         0  unit vectors, as the rows compare them           → SearchPart
       │
    driver          the loop over parts and chunks; hands the threshold down again with each chunk
       │
    coarse          1  coarse scores of a chunk, from the first source  → CoarseScores
       │                that does not give up on it:
       │                FusedCodeSource → CodeSource → FloatSource
       │
    candidates      2  rows whose upper bound reaches the threshold     → CandidatePairs
    shortlist          on a GPU: a fixed number of rows instead         → Shortlist
       │
    rerank          3  scored in float32, then in float64
       │
    topk            4  ranked by similarity, ties by row                → TopK

Below them are the modules they share: `threshold` (what k rows are known to reach), `scorer` (exact similarities of pairs),
`error_bounds` (every roundoff constant and formula), `codes` (quantized rows), `geometry` (how rows are compared), `chunks`,
`device` and `threads`. `backend` says what this machine can run: `cpu_kernels` (numba), `gpu_kernels` (Triton), or torch alone.
`approximate` stands beside all this: there FAISS proposes the rows.
"""

from tl_latentlens.search.topk import TopK
from tl_latentlens.search.vectors import VectorSearch

__all__ = ["TopK", "VectorSearch"]
