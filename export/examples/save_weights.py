import torch
from safetensors.torch import save_file

weights = torch.load("checkpoint.pt", weights_only=True)
weights = {f"taste.{name}": tensor for name, tensor in weights.items()}
save_file(weights, "my.safetensors", metadata={"kvcast.mask": "target_blind"})
