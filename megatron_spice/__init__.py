"""SPICE self-play training on Megatron-Core and SGLang. Start with `train.py`: it is the algorithm, top to bottom."""

__version__ = "0.1.0"
