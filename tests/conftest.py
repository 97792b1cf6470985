"""What every test runs under: one thread, and hypothesis examples that are the same every time."""

import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("quarterview", deadline=None, max_examples=25, derandomize=True, database=None)
settings.load_profile("quarterview")
