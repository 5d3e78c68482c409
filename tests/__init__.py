"""Tests, in the order of the package's files. The models are so small that more threads would slow them down."""

import torch

torch.set_num_threads(1)
