"""Defines the registries of mmbrecq.

Kinds that OpenMMLab knows are children of mmengine's root registries, so a config may mix scopes
(``mmbrecq.PTQLoop`` beside ``mmpretrain.Accuracy``). Kinds that only quantization knows have no root.
"""

from mmengine import registry as root
from mmengine.registry import Registry


def _modules(package: str, *names: str) -> list[str]:
    return [f'mmbrecq.{package}.{name}' for name in names]


# Datasets that the demo needs
DATASETS = Registry('dataset', scope='mmbrecq', parent=root.DATASETS, locations=['mmbrecq.data.datasets'])
# Loops that quantize or test instead of training
_LOOPS = _modules('engine', 'bit_search', 'evaluation', 'ptq_loop')
LOOPS = Registry('loop', scope='mmbrecq', parent=root.LOOPS, locations=_LOOPS)
# Hooks around every reconstructed unit
HOOKS = Registry('hook', scope='mmbrecq', parent=root.HOOKS, locations=['mmbrecq.engine.hooks'])
# Algorithms that turn a float model into a quantized one
QUANTIZERS = Registry('quantizer', scope='mmbrecq', locations=['mmbrecq.quantizers'])
# Range estimators: from values to a scale and a zero-point
OBSERVERS = Registry('observer', scope='mmbrecq', locations=['mmbrecq.observers'])
# Fake quantization of weights and of activations
FAKE_QUANTS = Registry('fake quant', scope='mmbrecq', locations=['mmbrecq.fake_quants'])
# Optimisation of rounding variables and step sizes, unit by unit
RECONSTRUCTORS = Registry('reconstructor', scope='mmbrecq', locations=['mmbrecq.reconstruction'])
# Distances between the float and the quantized output of a unit
LOSSES = Registry('reconstruction loss', scope='mmbrecq', locations=['mmbrecq.reconstruction'])
# Writers of deployable files
EXPORTERS = Registry('exporter', scope='mmbrecq', locations=['mmbrecq.deploy.exporters'])
# Runtimes that execute the exported files
BACKENDS = Registry('backend', scope='mmbrecq', locations=['mmbrecq.deploy.backends'])
# Algorithms that choose the bits of every layer
_SEARCHERS = _modules('mixed_precision.search', 'genetic', 'integer', 'nsga2')
SEARCHERS = Registry('searcher', scope='mmbrecq', locations=_SEARCHERS)
# What bits cost: bytes, bit operations, time
_COST_MODELS = _modules('mixed_precision.costs', 'models', 'measured')
COST_MODELS = Registry('cost model', scope='mmbrecq', locations=_COST_MODELS)
