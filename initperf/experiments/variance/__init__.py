"""Figure 7.4: variance of activations and gradients by layer."""
