"""Checks an exported ONNX file or OpenVINO IR against the rules of a preset, without running it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmbrecq.deploy.verify import PRESETS, RULES, verify_file
from mmbrecq.deploy.verify.verifier import rules_of
from mmbrecq.engine.config import add_debug, run_tool


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='Exit status: 0 if the file keeps all rules, 1 if it breaks one, 2 if it cannot be checked.',
    )
    parser.add_argument('file', nargs='?', help='.onnx with Q/DQ nodes, or .xml of an OpenVINO IR')
    parser.add_argument('--preset', choices=list(PRESETS), help='whose rules to apply; needed to check a file')
    parser.add_argument('--list-rules', action='store_true', help='print all rules, or those of the preset, and exit')
    add_debug(parser)
    args = parser.parse_args(argv)
    if not args.list_rules:
        if args.file is None:
            parser.error('expected a FILE to check')
        if args.preset is None:
            parser.error(f'expected --preset, one of: {", ".join(PRESETS)}')
    return args


def list_rules(preset: str | None) -> None:
    """Prints id, statement and source of each rule."""
    for name, rule in (RULES if preset is None else rules_of(preset)).items():
        print(f'{name}  {rule.description}  [{rule.source}]')


def main(argv: list[str] | None = None) -> int:
    """Prints what is broken; returns the exit status."""
    args = parse_args(argv)
    if args.list_rules:
        list_rules(args.preset)
        return 0
    violations = verify_file(args.file, args.preset)
    for violation in violations:
        print(violation)
    checked = ', '.join(rules_of(args.preset, Path(args.file).suffix))
    print(f'{args.file}: {len(violations) or "no"} violation(s) of the rules of preset {args.preset} ({checked})')
    return 1 if violations else 0


if __name__ == '__main__':
    sys.exit(run_tool(main))
