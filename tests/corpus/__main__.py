"""`python -m tests.corpus FOLDER`: writes the files and expectations, for people and fuzzers."""

import argparse
from pathlib import Path

from tests.corpus.make import write


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.corpus", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the files go, one folder a family")
    folder = parser.parse_args().folder
    print(f"{write(folder)} files in {folder}")


if __name__ == "__main__":
    main()
