"""The files that travel with a checkpoint: they import only torch, transformers and each other."""
