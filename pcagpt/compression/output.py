"""Where the results of compressing a model go."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pcagpt.rows import Provenance


@dataclasses.dataclass(frozen=True)
class Output:
    """The folder of a sweep or an advice.

    heading: the fields of its JSON file that do not come from tables; made_by: the
    provenance of what this command makes; check: raises UserError if the folder may not
    be written any more, or the corpus has changed; file: the name of a sweep's JSON
    file.
    """

    folder: Path
    heading: dict[str, Any]
    made_by: Provenance
    check: Callable[[], None]
    file: str = "sweep.json"
