"""Checks an exported file against the rules of its preset, without running it."""

from __future__ import annotations

from pathlib import Path

from mmbrecq.deploy.verify.ir import read_ir, verify_ir
from mmbrecq.deploy.verify.onnx_graph import read_onnx
from mmbrecq.deploy.verify.rules import PRESETS, rules_of
from mmbrecq.deploy.verify.violation import ExpectedQuantization, Violation
from mmbrecq.errors import ConfigError, ExportError

NAMED = 3


def verify_file(path: str | Path, preset: str, expected: ExpectedQuantization | None = None) -> list[Violation]:
    """Applies the rules of ``preset`` to an exported file.

    Args:
        path: ``.onnx`` with Q/DQ nodes, or ``.xml``, an OpenVINO IR, which shows whether C1 and V1 to V6 hold.
        preset: ``'academic'``, ``'onnxruntime'``, ``'openvino'`` or ``'tensorrt'``.
        expected: What the quantized torch model says of an ONNX file; None checks the file on its own.

    Returns:
        Broken rules in the order of their ids; empty if the file is fine.

    Raises:
        ConfigError: Unknown preset.
        ExportError: The file is missing, cannot be read, or is of another kind.
        DependencyError: The package that reads the file is not installed.
    """
    path = Path(path)
    if preset not in PRESETS:
        raise ConfigError(f'expected a preset of {", ".join(PRESETS)}, but got {preset!r}')
    if path.suffix not in ('.onnx', '.xml'):
        raise ExportError(f'{path}: expected an .onnx or .xml file, but got suffix {path.suffix!r}')
    if not path.is_file():
        raise ExportError(f'{path}: expected an exported file, but there is none')
    rules = rules_of(preset, path.suffix)
    if path.suffix == '.xml':
        found = [violation for violation in verify_ir(read_ir(path)) if violation.rule in rules]
        return sorted(found, key=lambda violation: violation.rule)
    graph = read_onnx(path, expected)
    return [violation for rule in rules.values() if rule.onnx for violation in rule.onnx(graph)]


def check_file(
    path: str | Path,
    preset: str,
    expected: ExpectedQuantization | None = None,
    shown_as: str | Path | None = None,
) -> None:
    """Like :func:`verify_file`, and raises where it finds anything.

    Messages name the file as ``shown_as``, where given.

    Raises:
        ExportError: The file breaks a rule; the message names the first rules and nodes, and counts the others.
    """
    violations = verify_file(path, preset, expected)
    if violations:
        named = '; '.join(str(violation) for violation in violations[:NAMED])
        others = f'; and {len(violations) - NAMED} more' if len(violations) > NAMED else ''
        raise ExportError(f'{shown_as or path} breaks the rules of preset {preset!r}: {named}{others}')
