"""What masked and compressed layers share: parameters, masks, checkpoints, what a mask means to kernels."""
