"""What each process that torchrun starts does: builds its shard, and searches all of them together with the others."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import tl_latentlens as tll
from support.shards import TRANSFORMS, build, differences, queries


def main(folder: Path) -> None:
    """Write what went wrong into a file of this process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    texts = list(tll.load_corpus("demo", limit=50))
    shard = build(tll.load_demo_model(), texts, folder / "by_rank")
    problems = [] if shard.path.name == f"shard-0000{rank}-of-00002.h5" else [str(shard.path)]
    dist.barrier()
    one = tll.Bank.open(folder / "one.h5")
    for transform in TRANSFORMS:
        ours = tll.ContextualIndex(folder / "bank", transform=transform, on="distributed")
        theirs = tll.ContextualIndex(one, transform=transform)
        problems += [f"{transform}: {name}" for name in differences(ours, theirs, queries(one))]
    ours, theirs = tll.ContextualIndex(folder / "bank", on="distributed"), tll.ContextualIndex(one)
    problems += [f"directions: {name}" for name in differences(ours.for_directions, theirs.for_directions, queries(one))]
    try:
        ours.search(queries(one) if rank else queries(one)[:5])
    except tll.InvalidInputError as error:
        problems += [] if "searched for different vectors" in str(error) else [str(error)]
    else:
        problems.append("different queries were answered")
    (folder / f"rank{rank}.json").write_text(json.dumps(problems))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
