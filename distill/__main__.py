"""``python -m distill``."""

import sys

from distill.callbacks.signals import LISTENER

if __name__ == "__main__":
    if "fit" in sys.argv[1:]:
        LISTENER.start()  # before the imports, which take seconds: a signal in them is not lost either
    from distill.cli import run

    run()
