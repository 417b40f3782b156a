"""Decoders for the Llama family and OPT that need neither transformers nor its modules."""
