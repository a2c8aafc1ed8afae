"""torch.library ops of the layers, with autograd."""
