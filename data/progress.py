"""Progress bars, on stderr: nothing is shown where that is not a terminal, or of what is done within a second."""

from functools import partial

from tqdm import tqdm

progress_bar = partial(tqdm, leave=False, delay=1, dynamic_ncols=True, disable=None)
