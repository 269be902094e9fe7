"""One torch thread for every test: small networks gain nothing from more, and two busy pools on two cores stall."""

import torch

torch.set_num_threads(1)
