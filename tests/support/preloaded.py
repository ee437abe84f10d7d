"""What processes of tests need, imported once: see `fresh`."""

import torch

import tl_latentlens.cli
import tl_latentlens.explorer.app

torch.set_num_threads(1)
tl_latentlens.load_demo_model()  # it imports TransformerLens, which takes longer than all the rest
