"""Runs of small sparse layers as one call: inference, training, gradients."""
