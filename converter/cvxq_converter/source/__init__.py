"""A checkpoint: its folder, its files and tensors, the network they make, the matrices inside."""
