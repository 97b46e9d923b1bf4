"""Torch uses one thread, as in an image worker: threads of several processes wait for each other."""

import torch

torch.set_num_threads(1)
