"""One thread is the fastest for nets this small, and two test runs at once do not slow each other."""

import torch

torch.set_num_threads(1)
