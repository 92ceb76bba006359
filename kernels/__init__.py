"""Numeric building blocks: `naive` defines each in plain PyTorch."""
