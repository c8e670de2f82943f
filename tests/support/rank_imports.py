"""What ranks need, imported once for all (see `ranks.py`), as a rank itself would: for the CPU."""

from megatron_spice.cluster import platform

platform.prepare("cpu")

import pytest  # noqa: E402, F401  multiprocessing imports the main module, which is pytest's
import torch.distributed  # noqa: E402, F401
import transformers  # noqa: E402, F401

import megatron_spice.checkpoint.checkpointer  # noqa: E402, F401
import megatron_spice.policy.policy  # noqa: E402, F401
