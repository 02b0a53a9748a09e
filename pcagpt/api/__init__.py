"""pcagpt as a library: opens, measures and compresses models from Python.

    model = pcagpt.load("checkpoints/gpt_baseline")
    print(model.loss("The people of the United States"))
    print(*model.generate("The people", max_tokens=20), sep="")
    small = pcagpt.compress(model, max_bytes=1_000_000)
    print(small.bytes, small.added_loss, small.interval)
    small.save("small")  # a run, for `pcagpt.load` and for every command

`import pcagpt` imports neither JAX nor this module; the first use of a function does.

- Errors. A mistake raises `pcagpt.UserError` with one line that says what to do. An
  error of the system, such as a full disk, stays an OSError.
- Output. Nothing is printed, unless `progress=True` asks for lines on stderr, or in a
  notebook below the cell. Remarks go to the logger `pcagpt`.
- Files. Only `Compressed.save` and `compress(..., cache_dir=FOLDER)` write files that
  stay. Models and corpora are only read.
- The process. Signals, the environment, the working directory and the settings of JAX
  and of logging stay as they are. JAX computes on its first device. torch computes
  models of other architectures, on the first GPU if it has one.

Shape letters: T tokens of a text, V vocabulary, D model width, K rank.
"""

import logging

from pcagpt import process

# A program that configures no logging sees no remarks.
logging.getLogger("pcagpt").addHandler(logging.NullHandler())

with process.as_guest(shows_progress=False):
    from pcagpt.api.factors import Factorization, factorize
    from pcagpt.api.model import Model, load
    from pcagpt.api.tables import Compressed, compress
