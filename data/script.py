"""What the scripts of `data` share, without `finetune`: a mistake becomes one message and an exit code."""

import io
import sys
from collections.abc import Callable, Sequence


def run(main: Callable[[Sequence[str]], None]) -> int:
    """Call a script's `main` with the command line, and return the exit code: 0, 2 on a mistake or an error of the
    system, 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may have what the encoding lacks
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
