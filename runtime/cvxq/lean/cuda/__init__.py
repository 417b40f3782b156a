"""The lean decoder in torch, for CUDA devices; its tests run it on a CPU, too."""
