"""`python -m jaxserve.serve [MODEL] [flags]`."""

import sys

from jaxserve.serve.launch import main

if __name__ == "__main__":
    main(sys.argv[1:], prog="python -m jaxserve.serve")
