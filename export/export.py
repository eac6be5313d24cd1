"""Export a network into a model repository, proved exact: the same as `kvcast export`."""

import sys

from kvcast.export.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
