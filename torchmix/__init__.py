"""torchmix: mixed-precision quantization between output features, native to PyTorch.

The map of the package, lowest layer first:

``packing``, ``tiles``, ``primitives``, ``accounting``
    bytes of packed codes, on disk and for GPU kernels, the quantization grid, stored bits
``ops``
    registered operators with readable references: ``torch.ops.torchmix.*``
``tensor``
    ``MixedPrecisionTensor``, the weight whose rows have different widths; ``TiledTensor``, the same for GPU kernels
``capture``, ``evaluation``
    what flows through linear layers; perplexity and KL divergence
``rounding``, ``salience``, ``allocation``, ``transforms``
    GPTQ, refit and refinement; what a row's error costs; which row gets how many bits; exact rewrites of a model
``selection``, ``repacking``, ``fusing``, ``scoring``, ``sequential``, ``calibration``, ``config``, ``checkpoint``
    which weights; the order that GPU kernels read; projections as one product; scores of all rows; rounding in
    sequence; what was measured;
    ``quantize_``; files
``workflow``, ``data``, ``huggingface``, ``tuning``
    ``calibrate``; tokens from texts, chats and data sets; transformers; training on top
``tuning``
    ``tune``: codes, scales and norms trained towards the original model, after quantization
``cli``, ``demo``
    the command line; the bundled model
"""

from __future__ import annotations

import sys
from pathlib import Path


def _is_command() -> bool:
    """Whether this process is the command ``torchmix``, which imports torch only when a command needs it."""
    if sys.argv[:1] == ["-m"] and "-m" in sys.orig_argv:  # python -m: the module's name follows
        return sys.orig_argv[sys.orig_argv.index("-m") + 1] == "torchmix"
    return bool(sys.argv) and Path(sys.argv[0]).name == "torchmix"


if not _is_command():
    from torchmix.allocation import BitPlan
    from torchmix.calibration import Calibration
    from torchmix.checkpoint import load_pretrained, planned_checkpoint_bytes, save_pretrained
    from torchmix.checkpoint_inspection import inspect_checkpoint
    from torchmix.config import MixLLMConfig, mixllm_config
    from torchmix.evaluation import Evaluation, evaluate
    from torchmix.fusing import FuseReport, fuse_projections, unfuse_projections
    from torchmix.huggingface import is_available as _transformers_is_available
    from torchmix.huggingface import register as _register_with_transformers
    from torchmix.repacking import RepackReport, repack, to_plain
    from torchmix.tensor import MixedPrecisionTensor, compile_blocks
    from torchmix.tuning import tune
    from torchmix.workflow import calibrate

    if _transformers_is_available():
        _register_with_transformers()

__all__ = [
    "BitPlan",
    "Calibration",
    "Evaluation",
    "FuseReport",
    "MixLLMConfig",
    "MixedPrecisionTensor",
    "RepackReport",
    "calibrate",
    "compile_blocks",
    "evaluate",
    "fuse_projections",
    "inspect_checkpoint",
    "load_pretrained",
    "mixllm_config",
    "planned_checkpoint_bytes",
    "repack",
    "save_pretrained",
    "to_plain",
    "tune",
    "unfuse_projections",
]
