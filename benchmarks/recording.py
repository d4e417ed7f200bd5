r"""Write the records of results/: say which code measures, and merge rows that were made elsewhere.

    python benchmarks/recording.py                        # what a machine without git has to be told, to be exported
    python benchmarks/recording.py merge FILE...          # rows of records that were made elsewhere, into results/
    python benchmarks/recording.py merge --instead-of "NVIDIA H100 80GB HBM3" FILE...    # for that device's

common/recording.py has what the benchmarks call for it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common import ROOT, recording
from common.refusals import told_in_a_line


@told_in_a_line
def main() -> int:
    """Print the exports for a machine without git, or merge records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="action", metavar="ACTION")
    merging = commands.add_parser("merge", help="put rows of records that were made elsewhere into results/")
    merging.add_argument("files", nargs="+", type=Path, metavar="FILE")
    merging.add_argument("--into", type=Path, default=ROOT / "results", help="folder of the records (results)")
    merging.add_argument("--instead-of", metavar="DEVICE", help="drop this device's rows that the new ones stand for")
    merging.add_argument("--from-changes", action="store_true", help="take rows of a changed tree, too")
    options = parser.parse_args()
    if options.action == "merge":
        recording.merge(options.files, options.into, options.from_changes, options.instead_of)
    else:
        print(recording.exports())
    return 0


if __name__ == "__main__":
    sys.exit(main())
