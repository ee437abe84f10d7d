"""Fill a bank from a loop of one's own: `BankWriter` hands out batches, `bank_hooks` records while they run.

Use this where the forward pass has another purpose too. Here the same pass also gives the model's loss on the corpus.
"""

import tempfile
from pathlib import Path

import torch

import tl_latentlens as tll

HOOK_NAMES = ["blocks.2.hook_resid_post", "blocks.2.hook_mlp_out"]


def main() -> None:
    """Plan, record, and run the batches; print the loss, then a row of the finished bank."""
    model = tll.load_demo_model()
    device = next(model.parameters()).device
    plan = tll.plan_corpus(model, tll.load_corpus("demo", limit=300), max_rows_per_token=20)
    record = tll.record_model(model, plan, HOOK_NAMES)
    loss, n_tokens = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own.h5"
        with tll.BankWriter.create(path, plan, record, batch_tokens=2048) as writer, torch.no_grad():
            for batch in writer.batches(device):
                logits = model.run_with_hooks(
                    batch.tokens, attention_mask=batch.attention_mask.long(), fwd_hooks=tll.bank_hooks(writer, batch)
                )
                scores = logits[:, :-1].log_softmax(-1).gather(-1, batch.tokens[:, 1:, None])[..., 0]
                loss -= float(scores[batch.attention_mask[:, 1:]].sum())
                n_tokens += int(batch.attention_mask[:, 1:].sum())
        bank = tll.Bank.open(path)
        bank.verify()
        print(f"{n_tokens} tokens on {device}, loss {loss / n_tokens:.2f}")
        print(f"{bank.n_rows} rows of {', '.join(bank.hook_names)}, every checksum right")
        print(f"row 7: {bank.row(7).context()}")


if __name__ == "__main__":
    main()
