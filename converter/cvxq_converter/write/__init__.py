"""A quantized network → its file, its report, its page."""
