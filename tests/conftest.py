"""One thread: the nets are small, and two test runs at once then do not slow each other down."""

import signal

import torch

torch.set_num_threads(1)

# In the background of a shell Ctrl-C is ignored, and would be by the runs that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
