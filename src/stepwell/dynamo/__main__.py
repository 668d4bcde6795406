"""`python -m stepwell.dynamo` is `stepwell worker`."""

import sys

from stepwell.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["worker", *sys.argv[1:]]))
