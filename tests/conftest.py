"""One thread: the nets are small, and two test runs at once then do not slow each other down."""

import torch

torch.set_num_threads(1)
