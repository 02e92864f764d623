"""Everything that travels with a checkpoint: flat files that import torch, transformers and each
other.
"""
