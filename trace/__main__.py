"""`python -m trace`: the command line of the standard library's `trace` module."""

import sys

from trace import standard_library_trace

if __name__ == "__main__":
    standard = standard_library_trace()
    assert standard.__file__ is not None
    sys.argv[0] = standard.__file__
    standard.main()
