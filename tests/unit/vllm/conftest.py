"""Torch uses one thread, as in an image worker: many threads on few cores are slow."""

import torch

torch.set_num_threads(1)
