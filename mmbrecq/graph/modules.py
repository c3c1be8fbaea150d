"""Graphs as modules, beside the modules in whose place they run.

A graph takes the place of a component's ``forward``. A component that could not be traced is also a call in that very
graph, and there its own ``forward`` is wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

_running: list[nn.Module] = []
"""The graphs that are being run, the innermost last."""


def graph_module(model: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A module that runs ``graph`` on the modules of ``model``.

    Args:
        model: Owner of all modules that the graph calls.
        graph: The graph.
        name: Of the class of the module.
    """
    module = fx.GraphModule(model, graph, class_name=name)
    module.register_forward_pre_hook(lambda module, _: _running.append(module))
    module.register_forward_hook(lambda *_: _leave(), always_call=True)
    return module


def _leave() -> None:
    _running.pop()


def set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Puts ``forward`` in the place of a module's own, but where a graph calls the module."""
    own = type(module).forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return own(module, *args, **kwargs) if _running else forward(*args, **kwargs)

    object.__setattr__(module, 'forward', call)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts ``module`` at ``path`` below ``model``, in the place of what is there."""
    parent, _, name = path.rpartition('.')
    setattr(model.get_submodule(parent), name, module)
