"""Holds the namespace of the switches until it is ended; see `namespaces`."""

import sys

from benchmarks.rooms.flash.namespaces import enter

if __name__ == "__main__":
    enter()
    print("entered", flush=True)
    sys.stdin.read()
