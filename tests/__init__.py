"""Tests, in the order of the package's files. Models are tiny here, so that threads would only wait for each other."""

import torch

torch.set_num_threads(1)
