"""Shows what this machine can run, what is missing and what to do about it; checks every backend against
float64.

Exit code 1 when something that should work does not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

HELP = "what this machine can run, and a self-check of every backend"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-check", action="store_true", help="leave out the numerical self-check")
    parser.add_argument("--json", action="store_true", help="the findings as JSON, for a bug report")


def run(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from flex import doctor

    findings = doctor.examine(check=not arguments.no_check)
    if arguments.json:
        kept = list(findings)
        print(json.dumps([asdict(finding) for finding in kept], indent=1))
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        kept = doctor.write(findings, print, colour)
        print(f"\n{doctor.verdict(kept)}")
    return 1 if any(finding.state == "failed" for finding in kept) else 0
