"""What processes of tests need, imported once: see `fresh`."""

import torch

torch.set_num_threads(1)
