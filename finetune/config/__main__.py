"""`python -m finetune.config [--schema]`: every key of a configuration file, or its JSON schema for editors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from finetune import cli
from finetune.config.describe import describe, json_schema


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m finetune.config", description="Every key of a configuration file.")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema for editors")
    print(json.dumps(json_schema(), indent=2) if parser.parse_args(argv).schema else describe())


if __name__ == "__main__":
    cli.run(main)
