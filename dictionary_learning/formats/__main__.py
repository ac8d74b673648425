"""python -m dictionary_learning.formats SOURCE FOLDER: write an SAE of any family as ours, in both formats."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..dictionary import GeneralSAE
from . import load_dictionary, save_sae


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m dictionary_learning.formats", description=__doc__)
    parser.add_argument("source", help="folder, file, or USER/REPO[@REVISION]/PATH on the Hub")
    parser.add_argument("folder", type=Path, help="new folder of the SAE")
    args = parser.parse_args(argv)
    try:
        if args.folder.exists() and any(args.folder.iterdir()):
            raise ValueError(f"{args.folder} exists and holds other things: name a new folder.")
        ae, config = load_dictionary(args.source)
        if isinstance(ae, GeneralSAE):
            ae = ae.converted()
            config["trainer"]["dict_class"] = ae.class_name
        save_sae(args.folder, ae, config)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{args.folder}: {ae.class_name}, from {config['source']['format']}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
