"""``echo-infinity train`` as a module, for torchrun: ``torchrun -m echo_infinity.training.launch STAGE ...``."""

import sys

from echo_infinity.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
