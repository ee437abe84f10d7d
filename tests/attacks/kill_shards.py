"""Shards built by processes of which one is killed again and again, at random moments.

`PYTHONPATH=tests python tests/attacks/kill_shards.py 50` kills fifty.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

# No threads but the main one: a forked child has no other.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import torch
from tqdm import tqdm

import tl_latentlens as tll
from tl_latentlens.bank import create

N_SHARDS = 4


def main(n_kills: int, seed: int, folder: Path, record: Path) -> None:
    """Kill a process so many times, build what is left, merge, and write down how it went."""
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # a thread would be lost in the children
    create.BATCHES_PER_BLOCK = 2
    model, texts = tll.load_demo_model(), list(tll.load_corpus("demo", limit=70))
    settings = {"hook_names": [1, 4], "batch_tokens": 128, "progress": False}
    one = tll.build_bank(model, texts, folder / "one.h5", shard=(0, 1), **settings)

    def start(shard: int) -> int:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                tll.build_bank(model, texts, folder / "bank", shard=(shard, N_SHARDS), **settings).close()
                code = 0
            finally:
                os._exit(code)
        return pid

    began = time.monotonic()
    codes = [os.waitstatus_to_exitcode(os.waitpid(start(0), 0)[1])]
    seconds = time.monotonic() - began
    rng, killed, left = random.Random(seed), 0, [1, 2, 3]
    while left:
        running = {start(shard): shard for shard in left[:2]}  # two ranks at a time
        victim = rng.choice(list(running)) if killed < n_kills else None
        if victim is not None:
            time.sleep(rng.random() * 1.2 * seconds)
            os.kill(victim, signal.SIGKILL)
        for pid, shard in running.items():
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            killed += code == -signal.SIGKILL
            codes += [code] if code != -signal.SIGKILL else []
            if code == 0 and killed >= n_kills:
                left.remove(shard)
            elif code == 0:  # there are kills to come: it is built again
                (folder / "bank" / f"shard-{shard:05}-of-{N_SHARDS:05}.h5").unlink()
    merged = tll.merge_bank(folder / "bank", folder / "merged.h5", progress=False)
    identical = merged.path.read_bytes() == one.path.read_bytes()
    others = sorted(path.name for path in (folder / "bank").iterdir() if path.suffix != ".h5")
    record.write_text(json.dumps({"killed": killed, "codes": codes, "identical": identical, "others": others}))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, Path(work), Path(work) / "record.json")
        sys.stdout.write((Path(work) / "record.json").read_text() + "\n")
