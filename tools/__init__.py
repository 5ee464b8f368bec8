"""Command-line entry points, one a job: `torchrun tools/pretrain.py` and plain `python tools/pretrain.py` both work."""
