"""A weight taken apart: factors, their ranks, and how they are found. It knows tensors, no layers."""
