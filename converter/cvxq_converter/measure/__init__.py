"""What the original predicts, and how much that feels each weight: what all choices rest on."""
