"""Knobs: their declaration, their checks, and the command line that sets them."""

from pcagpt.config.checks import (
    arms_of,
    check_rules,
    check_stored,
    methods_of,
    ranks_of,
)
from pcagpt.config.schema import KNOBS, Settings, base, override
from pcagpt.config.unread import validate
