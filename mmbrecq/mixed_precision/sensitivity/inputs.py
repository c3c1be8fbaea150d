"""What reconstructed states depend on, so that none is taken up by another run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmbrecq.distributed import gather
from mmbrecq.kernels.native import kernel_state


def describe_inputs(cfg: Mapping[str, Any], model: nn.Module, images: Tensor, seed: int) -> dict[str, str]:
    """Settings in the config's words, weights and images by their hash; the bits of layers are no part of it.

    Args:
        cfg: The config.
        model: With its float weights, not prepared yet.
        images: Preprocessed calibration images of this process.
        seed: Of the run.
    """
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    settings = {key: value for key, value in cfg['quantizer'].items() if key != 'overrides'}
    settings['weight'] = {key: value for key, value in settings['weight'].items() if key != 'bits'}
    # of each image, so that it does not depend on how many processes have them
    own = [hashlib.sha256(image.cpu().numpy().tobytes()).digest() for image in images]
    hashes = [digest for part in gather(own) for digest in part]
    return {
        'quantizer': _in_words(settings),
        'reconstructor': _in_words(cfg['reconstructor']),
        'seed': str(seed),
        # a GPU never runs them
        'kernels': 'none' if images.is_cuda else kernel_state(),
        'float weights': weights.hexdigest()[:16],
        'calibration images': hashlib.sha256(b''.join(hashes)).hexdigest()[:16],
    }


def _in_words(value: Any) -> str:
    """A config value, its keys in order."""
    if isinstance(value, Mapping):
        return '{' + ', '.join(f'{key}: {_in_words(value[key])}' for key in sorted(value)) + '}'
    if isinstance(value, (list, tuple)):
        return '[' + ', '.join(map(_in_words, value)) + ']'
    return repr(value)
