"""Load language models, adapt and quantize them, and certify their weights."""
