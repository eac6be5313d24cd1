import torch
from my_network import Taste

torch.manual_seed(0)
torch.save(Taste(items=500, categories=80, actions=64, width=16, divisor=50).state_dict(), "checkpoint.pt")
