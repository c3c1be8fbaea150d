"""Graphs as modules, beside the modules in whose place they run.

A graph takes the place of a component's ``forward``. A component that could not be traced is also a call in that very
graph, and there its own ``forward`` is wanted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import fx, nn


class _Running(threading.local):
    """How many graphs run within each other on this thread."""

    depth = 0


_running = _Running()


def graph_module(model: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A module that runs ``graph`` on the modules of ``model``.

    Args:
        model: Owner of all modules that the graph calls.
        graph: The graph.
        name: Of the class of the module.
    """
    module = fx.GraphModule(model, graph, class_name=name)
    module.register_forward_pre_hook(lambda *_: _move(1))
    module.register_forward_hook(lambda *_: _move(-1), always_call=True)
    return module


def _move(by: int) -> None:
    _running.depth += by


def set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Puts ``forward`` in the place of a module's own, but where a graph calls the module."""
    present = vars(module).get('forward')
    own = getattr(present, 'own', present) or partial(type(module).forward, module)

    def call(*args: Any, **kwargs: Any) -> Any:
        return (own if _running.depth else forward)(*args, **kwargs)

    setattr(call, 'own', own)  # noqa: B010 - a function's attribute
    object.__setattr__(module, 'forward', call)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts ``module`` at ``path`` below ``model``, in the place of what is there."""
    parent, _, name = path.rpartition('.')
    setattr(model.get_submodule(parent), name, module)
